"""What the engine knows of a request while it runs."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from cupaged.engine.logit_edits import LogitEdits, LogitRules
from cupaged.engine.output_text import OutputText
from cupaged.engine.prefix import Link, PrefixBlock, PrefixKey
from cupaged.outputs import Logprob, RequestMetrics
from cupaged.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from cupaged.engine.beam_search import BeamSearch


class SequenceState(Enum):
    WAITING = "waiting"  # holds no blocks: new, or preempted
    SWAPPED = "swapped"  # preempted too, but what it has computed is kept in the host's memory
    RUNNING = "running"  # holds blocks and a row of the batch
    FINISHED = "finished"


FINISHED = SequenceState.FINISHED  # for what looks at each sequence of a step: the enum's attribute takes 0.3 us (3.11)


class Request:
    """What a caller asked for, and the sequences that answer it.

    They wait, run and are preempted together. When there are several, the first unfinished one computes the prompt
    for all; then the request forks, and each goes on by itself.

    seed: keys the draws of its first sequence, the others' follow: the caller's, or one drawn for it.
    logit_rules: what its parameters do to logits; None for nothing.
    priority: lower values come first. prefix_key: with whom it may share the cache of its prompt.
    max_len: where its sequences end, prompt and output together; None for max_tokens alone.
    search: if it is a beam search, that. Its sequences are the beams then, at its end what it has found. They get their
    next tokens in the same step, always.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        seed: int,
        arrival_time: float,
        logit_rules: LogitRules | None = None,
        *,
        priority: int = 0,
        prefix_key: PrefixKey | None = None,
        max_len: int | None = None,
        search: BeamSearch | None = None,
    ):
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.seed = seed
        self.logit_rules = logit_rules
        self.priority = priority
        self.prefix_key = prefix_key or PrefixKey(model="")
        self.max_len = max_len
        self.search = search
        self.num_logprobs = params.num_logprobs if search is None else search.num_candidates
        # Its next step can't be prepared before the results of this one are there: which tokens, not only how many.
        self.needs_tokens = logit_rules is not None or params.prompt_logprobs is not None
        self.picks_best = params.picks_best
        self.tells_end_only = params.output_kind is RequestOutputKind.FINAL_ONLY or self.picks_best
        self.tells_news_only = params.output_kind is RequestOutputKind.DELTA
        self.metrics = RequestMetrics(arrival_time)
        self.num_cached_tokens: int | None = None  # of the prompt, found in the cache; None before it is scheduled
        # What RequestOutput.prompt_logprobs is to be, as far as computed.
        self.prompt_logprobs: list | None = [None] if params.prompt_logprobs is not None else None
        self.num_sent_prompt_logprobs = 0  # what earlier outputs of kind DELTA told
        self.sequences = [Sequence(self, index) for index in range(params.num_sequences)]
        self.is_single = len(self.sequences) == 1 and search is None  # nobody ever shares a block that it writes to

        # The scheduler's:
        self.rank = (0, 0)  # its place among all: the lowest is served first
        self.is_forking = False  # its first unfinished sequence computes the prompt for several
        self.active: list[Sequence] = []  # those that compute: one while it is forking, else all unfinished ones

    @property
    def unfinished(self) -> list[Sequence]:
        return [seq for seq in self.sequences if seq.state is not FINISHED]

    @property
    def finished(self) -> bool:
        for seq in self.sequences:  # noqa: SIM110  asked for each output, and all() would take twice as long
            if seq.state is not FINISHED:
                return False
        return True

    @property
    def is_swapped(self) -> bool:
        return any(seq.state is SequenceState.SWAPPED for seq in self.sequences)

    @property
    def is_resuming(self) -> bool:
        """Whether it was preempted, and its first sequence computes for several again."""
        return self.is_forking and any(seq.num_output_tokens for seq in self.unfinished)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    def num_reusable_tokens(self, num_tokens: int) -> int:
        """Of its first `num_tokens` tokens, the prompt and perhaps more, those that may come from the cache, which has
        no logits: those before the last one, and before the first whose logits prompt_logprobs still needs."""
        if self.prompt_logprobs is None or len(self.prompt_logprobs) == self.num_prompt_tokens:
            return num_tokens - 1
        return len(self.prompt_logprobs) - 1

    @property
    def num_shared_tokens(self) -> int:
        """The first tokens, which all its sequences have in common: the prompt, and what beams agree on besides."""
        if self.search is None:
            return self.num_prompt_tokens
        # Of a beam's output the last token is never shared: its logits are wanted for each beam.
        num_settled = min(self.search.settled.num_output_tokens, self.sequences[0].num_output_tokens - 1)
        return self.num_prompt_tokens + max(0, num_settled)

    @property
    def num_computed_tokens(self) -> int:
        """In the cache; what several sequences share counts once."""
        num_tokens = sum([seq.num_cached_tokens for seq in self.active])
        return num_tokens - max(0, len(self.active) - 1) * self.num_shared_tokens

    def num_wanted_tokens(self, seq: Sequence) -> int:
        """How many tokens of `seq`, an active one, are to be computed as things stand."""
        return self.num_shared_tokens if self.is_forking else len(seq.token_ids)


class Sequence:
    """A prompt and what was generated after it.

    token_ids  |<------ prompt ------>|<------ output ------>|
               |<-- num_cached_tokens -->|<-- uncomputed --->|
    block_table    covers the cached tokens, and those that were given room for this step
    swapped_table  covers the cached tokens while it is swapped: blocks of the swap space

    An uncomputed token's keys and values are not in the cache yet. A sequence that decodes has exactly one, its
    last; a preempted one has them all, unless it is swapped.

    prefix: its full blocks, as far as they have been named; the first num_registered_blocks of them can be found in
    the cache, and link stands for their content (None: what follows is not to be found).
    """

    __slots__ = (
        "block_table",
        "cumulative_logprob",
        "error",
        "finish_reason",
        "index",
        "link",
        "logit_edits",
        "logprobs",
        "news_start",
        "num_cached_tokens",
        "num_prompt_tokens",
        "num_registered_blocks",
        "output_text",
        "prefix",
        "request",
        "row",
        "state",
        "stop_reason",
        "swapped_table",
        "token_ids",
    )

    def __init__(self, request: Request, index: int):
        self.request = request
        self.index = index  # among the request's sequences
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_cached_tokens = 0
        self.block_table: list[int] = []  # block ids in token order
        self.swapped_table: list[int] = []
        self.state = SequenceState.WAITING
        self.prefix: list[PrefixBlock] = []
        self.num_registered_blocks = 0
        self.link: Link | None = None
        self.row = -1  # of the batch's host arrays, while running
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None  # why, when finish_reason is "error"

        self.logit_edits = LogitEdits(request.logit_rules) if request.logit_rules is not None else None
        self.output_text: OutputText | None = None  # None when nothing is to be detokenised
        self.logprobs: list[dict[int, Logprob]] | None = [] if request.params.logprobs is not None else None
        self.cumulative_logprob = 0.0
        self.news_start = self.num_prompt_tokens  # earlier outputs of kind DELTA told of the output before this token

    def follow(self, beam: Sequence) -> None:
        """Take over its output so far."""
        self.token_ids = beam.token_ids.copy()
        if beam.logprobs is not None:
            self.logprobs = beam.logprobs.copy()

    @property
    def seed(self) -> int:
        return (self.request.seed + self.index) % 2**64

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_cached_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens
