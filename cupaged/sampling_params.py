"""What a request may ask of its sampling. Names, defaults and meanings are those of vLLM's SamplingParams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from cupaged.arguments import is_finite_number, is_int, require

# Below this a temperature means greedy: dividing logits by less only overflows them.
MIN_TEMPERATURE = 1e-5
# More alternatives than this a token would make the top-k search slower than the step itself.
MAX_LOGPROBS = 20


class RequestOutputKind(Enum):
    """What a request's outputs hold, step by step."""

    CUMULATIVE = "cumulative"  # everything generated so far
    DELTA = "delta"  # what is new since the last output
    FINAL_ONLY = "final_only"  # one output, at the end; costs the least


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are drawn and when it ends.

    temperature: divides the logits; 0 means greedy (the most likely token, the lowest id on a tie).
    top_k: keep the k most likely tokens; 0 or -1 keeps all. Tokens tied with the k-th are kept as well.
    top_p: then keep the fewest tokens whose probability reaches top_p, in (0, 1].
    min_p: keep tokens at least min_p times as likely as the most likely one, in [0, 1].
    seed: makes the draws repeatable, whatever else runs in the batch; None draws a fresh one.
    max_tokens: the most tokens to generate, at least 1; None means up to the context's end.
    stop: strings that end the output; they are cut off unless include_stop_str_in_output.
    stop_token_ids: ids that end the output, besides the model's EOS ids.
    ignore_eos: go on after an EOS id.
    logprobs: for each generated token, the log probabilities of this many most likely tokens and of the
        sampled one (0: of the sampled one alone); None computes none.
    skip_special_tokens: leave special tokens such as EOS out of the text.
    detokenize: turn the output into text; token ids come in any case.
    output_kind: what the outputs of the steps hold. LLM.generate always gives the final ones.

    Raises ValueError that names the argument when a value makes no sense.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))

        require(
            is_finite_number(self.temperature) and self.temperature >= 0,
            "temperature", self.temperature, "a finite number, at least 0 (0 is greedy)",
        )  # fmt: skip
        require(is_finite_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        require(is_finite_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        require(is_int(self.top_k) and self.top_k >= -1, "top_k", self.top_k, "an integer >= 1, or 0 or -1 for all")
        require(
            self.max_tokens is None or (is_int(self.max_tokens) and self.max_tokens >= 1),
            "max_tokens", self.max_tokens, "an integer >= 1, or None for no limit",
        )  # fmt: skip
        require(
            self.seed is None or (is_int(self.seed) and 0 <= self.seed < 2**64),
            "seed", self.seed, "an integer in [0, 2**64), or None",
        )  # fmt: skip
        require(
            self.logprobs is None or (is_int(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS),
            "logprobs", self.logprobs, f"an integer in [0, {MAX_LOGPROBS}], or None",
        )  # fmt: skip
        require(
            all(isinstance(s, str) and s for s in stop), "stop", self.stop, "a non-empty string, or several of them"
        )
        require(
            all(is_int(t) and t >= 0 for t in self.stop_token_ids),
            "stop_token_ids", self.stop_token_ids, "token ids >= 0",
        )  # fmt: skip
        require(not (stop and not self.detokenize), "detokenize", self.detokenize, "True when stop strings are given")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken without a draw; top_k=1 leaves no choice either."""
        return self.temperature < MIN_TEMPERATURE or self.top_k == 1
