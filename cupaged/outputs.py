"""What a request gives back, in the shapes that users of vLLM know."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """One token's log probability under the raw logits (before temperature, top-k and the like)."""

    logprob: float
    rank: int  # 1 for the most likely token
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence of a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None  # sum over token_ids; None unless logprobs were asked for
    logprobs: list[dict[int, Logprob]] | None = None  # per token: id -> Logprob, the sampled id among them
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"; None while it runs
    stop_reason: int | str | None = None  # the stop string or stop token id that ended it; None for EOS and length
    error: str | None = None  # what went wrong, when finish_reason is "error"


@dataclass(slots=True)
class BeamSearchSequence:
    """One of the sequences that LLM.beam_search found. tokens and text begin with the prompt."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]] | None  # per generated token, if asked for
    text: str
    cum_logprob: float  # of the generated tokens
    finish_reason: str | None  # as in CompletionOutput
    stop_reason: int | str | None


@dataclass(slots=True)
class BeamSearchOutput:
    """What LLM.beam_search found for a prompt, the best first."""

    sequences: list[BeamSearchSequence]


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds on `time.monotonic()`'s clock.

    peak_blocks: the most KV cache blocks that it held, shared ones counted once; looked at whenever it gives up some,
    except where beams replace each other. num_output_tokens: of the longest of its outputs that have ended.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    peak_blocks: int = 0
    num_output_tokens: int = 0

    @property
    def queue_time(self) -> float | None:
        """How long it waited before its first step."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def inter_token_latency(self) -> float | None:
        """Mean time between two tokens of an output, at its end; None when there are none to be between."""
        if self.finished_time is None or self.num_output_tokens < 2:
            return None
        return (self.finished_time - self.first_token_time) / (self.num_output_tokens - 1)


@dataclass(slots=True)
class RequestOutput:
    """A request's state after a step (streaming) or at its end.

    outputs are in the order of their index. With RequestOutputKind.DELTA only those are there that have news, and of
    prompt_logprobs what is new; None when nothing is.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None  # of the prompt, found in the prefix cache; None before it is scheduled
    # If asked for: None for the prompt's first token, then per token: id -> Logprob, the prompt's own id among them.
    # Shorter than the prompt when the request ended before that was computed.
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
