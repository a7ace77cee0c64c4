"""What a request may ask of its sampling or of its beam search. Names, defaults and meanings are vLLM's, as far as it
has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from enum import Enum
from typing import Any

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

    n: how many outputs the prompt is to get. The prompt is computed once; output i is drawn with seed + i.
    best_of: draw this many outputs, and return the n whose tokens have the largest sum of log probabilities, the best
        first, when all have ended. None draws n.
    temperature: divides the logits; 0 means greedy (the most likely token, the lowest id on a tie).
    top_k: keep the k most likely tokens; 0 or -1 keeps all. Tokens tied with the k-th are kept as well.
    top_p: then keep the fewest tokens whose probability reaches top_p, in (0, 1].
    min_p: keep tokens at least min_p times as likely as the most likely one, in [0, 1].
    seed: makes the draws repeatable, whatever else runs in the batch; None draws a fresh one.
    max_tokens: the most tokens to generate, at least 1; None means up to the context's end.
    min_tokens: until there are this many, no EOS id and none of stop_token_ids is drawn, and no stop string counts.
    stop: strings that end the output; they are cut off unless include_stop_str_in_output.
    stop_token_ids: ids that end the output, besides the model's EOS ids.
    ignore_eos: go on after an EOS id.
    repetition_penalty: divides a positive logit, multiplies a negative one, of each token that the prompt or the
        output holds; in [1e-6, 1e6], 1 does nothing.
    presence_penalty: is subtracted from the logit of each token that the output holds, in [-2, 2].
    frequency_penalty: is subtracted as many times as the output holds the token, in [-2, 2].
    logit_bias: {token id: what is added to its logit, before the penalties}; -inf forbids the token.
    bad_words: texts that are not to be generated: the last token of one is forbidden when those before it have just
        been drawn, spelled with or without a space in front.
    allowed_token_ids: no other ids are drawn; None allows all.
    logits_processors: functions f(output_token_ids, logits) -> logits, or f(prompt_token_ids, output_token_ids, logits)
        -> logits, called one after another before each draw. logits [vocabulary] float32 is an array of the device
        (cupy.ndarray, or numpy.ndarray on the CPU) with what the model gave, valid until f returns; f may change it,
        and what it returns takes its place. All of the above but temperature, top_k, top_p and min_p comes after them.
        If f raises or returns something else, the output ends with finish_reason "error".
    logprobs: for each generated token, the log probabilities of this many most likely tokens and of the
        sampled one (0: of the sampled one alone); None computes none. Nothing that changes logits shows in them.
    prompt_logprobs: the same for each token of the prompt but the first, which has none. A request that wants them
        computes its prompt itself, whatever the prefix cache holds of it.
    skip_special_tokens: leave special tokens such as EOS out of the text.
    detokenize: turn the output into text; token ids come in any case.
    output_kind: what the outputs of the steps hold. LLM.generate always gives the final ones.

    Raises ValueError that names the argument when a value makes no sense.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    logits_processors: Sequence[Callable[..., Any]] | None = field(default=None, hash=False)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        bad_words = (self.bad_words,) if isinstance(self.bad_words, str) else tuple(self.bad_words or ())
        object.__setattr__(self, "bad_words", bad_words)
        if isinstance(self.logits_processors, Sequence) or self.logits_processors is None:
            object.__setattr__(self, "logits_processors", tuple(self.logits_processors or ()))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))

        require(is_int(self.n) and self.n >= 1, "n", self.n, "an integer >= 1")
        require(
            self.best_of is None or (is_int(self.best_of) and self.best_of >= self.n),
            "best_of", self.best_of, f"an integer >= n={self.n}, or None",
        )  # fmt: skip
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
        require(is_int(self.min_tokens) and self.min_tokens >= 0, "min_tokens", self.min_tokens, "an integer >= 0")
        require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens", self.min_tokens, f"at most max_tokens={self.max_tokens}",
        )  # fmt: skip
        require(
            self.seed is None or (is_int(self.seed) and 0 <= self.seed < 2**64),
            "seed", self.seed, "an integer in [0, 2**64), or None",
        )  # fmt: skip
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            require(
                value is None or (is_int(value) and 0 <= value <= MAX_LOGPROBS),
                name, value, f"an integer in [0, {MAX_LOGPROBS}], or None",
            )  # fmt: skip
        require(
            all(isinstance(s, str) and s for s in stop), "stop", self.stop, "a non-empty string, or several of them"
        )
        require(
            all(is_int(t) and t >= 0 for t in self.stop_token_ids),
            "stop_token_ids", self.stop_token_ids, "token ids >= 0",
        )  # fmt: skip
        require(
            is_finite_number(self.repetition_penalty) and 1e-6 <= self.repetition_penalty <= 1e6,
            "repetition_penalty", self.repetition_penalty, "in [1e-6, 1e6] (1 does nothing)",
        )  # fmt: skip
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(is_finite_number(value) and -2 <= value <= 2, name, value, "in [-2, 2]")
        require(
            self.logit_bias is None
            or (
                isinstance(self.logit_bias, Mapping)
                and all(
                    is_int(t) and t >= 0 and (is_finite_number(b) or b == -math.inf)
                    for t, b in self.logit_bias.items()
                )
            ),
            "logit_bias", self.logit_bias, "a dict from token ids >= 0 to finite numbers, or -inf",
        )  # fmt: skip
        require(
            all(isinstance(s, str) and s for s in bad_words),
            "bad_words", self.bad_words, "a non-empty string, or several of them",
        )  # fmt: skip
        require(
            self.allowed_token_ids is None
            or (len(self.allowed_token_ids) > 0 and all(is_int(t) and t >= 0 for t in self.allowed_token_ids)),
            "allowed_token_ids", self.allowed_token_ids, "token ids >= 0, at least one, or None for all",
        )  # fmt: skip
        require(
            isinstance(self.logits_processors, tuple) and all(callable(f) for f in self.logits_processors),
            "logits_processors", self.logits_processors, "a list of functions",
        )  # fmt: skip
        require(not (stop and not self.detokenize), "detokenize", self.detokenize, "True when stop strings are given")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken without a draw; top_k=1 leaves no choice either."""
        return self.temperature < MIN_TEMPERATURE or self.top_k == 1

    @property
    def num_sequences(self) -> int:
        """How many outputs are drawn."""
        return self.best_of or self.n

    @property
    def picks_best(self) -> bool:
        """Whether more are drawn than returned."""
        return self.num_sequences > self.n

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives' log probabilities are computed; 0: the drawn tokens' only; None: not even these."""
        return 0 if self.picks_best and self.logprobs is None else self.logprobs


@dataclass(frozen=True)
class BeamSearchParams:
    """How one request's beam search goes. It has `beam_width` outputs, the best first.

    The likeliest beam_width continuations of the prompt are followed; those that end are kept, with
    score = cumulative_logprob / length ** length_penalty, where length counts the output's tokens, the one that
    ended it included. An output ends with EOS, one of stop_token_ids, a stop string or max_tokens; it competes for a
    place among those kept when it is one of the best beam_width continuations of its step.

    beam_width: at least 1.
    max_tokens, ignore_eos, include_stop_str_in_output, stop, stop_token_ids, logprobs, skip_special_tokens,
        detokenize: as in SamplingParams. max_tokens None means up to the context's end.
    temperature: only 0, since nothing is drawn: beams are ranked by the raw logits' log probabilities.
    length_penalty: above 0 favours long outputs, below 0 short ones.
    early_stopping: True ends the search when beam_width outputs are kept; False when, besides, no beam has a better
        score as long as it is now; "never" when no beam can get a better score within max_tokens.
    output_kind: while the search goes on, its outputs hold one completion: the tokens on which all beams agree.

    Raises ValueError that names the argument when a value makes no sense.
    """

    beam_width: int
    max_tokens: int | None
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    _: KW_ONLY
    early_stopping: bool | str = False
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self):
        require(is_int(self.beam_width) and self.beam_width >= 1, "beam_width", self.beam_width, "an integer >= 1")
        require(
            is_finite_number(self.temperature) and self.temperature == 0,
            "temperature", self.temperature, "0: beam search draws nothing",
        )  # fmt: skip
        require(is_finite_number(self.length_penalty), "length_penalty", self.length_penalty, "a finite number")
        require(
            isinstance(self.early_stopping, bool) or self.early_stopping == "never",
            "early_stopping", self.early_stopping, 'True, False or "never"',
        )  # fmt: skip
        checked = self.for_each_beam()
        object.__setattr__(self, "stop", checked.stop)
        object.__setattr__(self, "stop_token_ids", checked.stop_token_ids)

    def for_each_beam(self) -> SamplingParams:
        """What holds for each beam as it does for a sampled output."""
        return SamplingParams(
            n=self.beam_width,
            temperature=0,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            logprobs=self.logprobs,
            skip_special_tokens=self.skip_special_tokens,
            include_stop_str_in_output=self.include_stop_str_in_output,
            detokenize=self.detokenize,
            output_kind=self.output_kind,
        )
