"""Which sequences run in a step, and how many tokens each, with continuous batching."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from cupaged.engine.block_manager import BlockManager
from cupaged.engine.block_pool import NULL_BLOCK
from cupaged.engine.sequence import FINISHED, Request, Sequence, SequenceState
from cupaged.engine.swap import SwapSpace


@dataclass
class Schedule:
    """One step: sequences[i] computes its next num_tokens[i] tokens. Those that compute one stand first."""

    sequences: list[Sequence] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    num_decodes: int = 0  # leading sequences with one token
    # (index in sequences, for whom): the next token of the second is drawn from the logits of the first's last one.
    sampled: list[tuple[int, Sequence]] = field(default_factory=list)
    # (source, destination) of blocks, copied beforehand: into the swap space, out of it, and then within the cache.
    swap_outs: list[tuple[int, int]] = field(default_factory=list)
    swap_ins: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    failed: list[Request] = field(default_factory=list)  # finished instead: no memory, even with nothing else running
    is_advanced: bool = False  # its tokens count as computed


class _NeedsTokens(Exception):
    """What is to be scheduled depends on the tokens that the step in flight draws."""


class Scheduler:
    """Both `running` and `waiting` are in the order of service: by priority if the policy is that, then by arrival.
    Under fcfs, and among requests of one priority, whoever runs came before whoever waits.

    - What runs comes first, each sequence with one token at least. What that leaves of the token budget goes to
      prompts, in chunks if need be, in the order of service. A prompt is admitted only while budget is left.
    - While somebody decodes, a prompt that needs more takes max_chunk tokens of a step at most, so that one long prompt
      doesn't hold up the streams. Several prompts may take as many each.
    - A prompt's blocks are taken at its admission, all or none (with a sliding window those that it holds at a time),
      and only if as many are left as sequences run, so that each can grow by one, and as a preempted group's sequences
      need again for their outputs: an admission that must be undone a few steps later helps nobody. A block for output
      is taken when the last one is full.
    - When there is none, the last in service is preempted: it loses its blocks and goes back to its place in
      `waiting`. The first one therefore always gets on, and every request becomes the first some day, unless requests
      of higher priority never end.
    - What a preempted request has computed is swapped, if there is a swap space with room for it and copying takes
      less time than computing it again (or always_swap is set); otherwise it is computed again.
    - A waiting request takes the place of running ones of lower priority if it can't run beside them. While it
      waits, they compute no more than a token a step.
    - A prompt whose next block is computed in this very step waits until the next one, to share that block. It waits
      a step only, as nothing that is admitted after others has begun yet, and nobody overtakes it.
    - The sequences of a request are admitted, preempted and resumed together. The first one computes the prompt;
      the others then fork from it.

    A step is in flight between schedule() and complete(). A sequence that ends meanwhile keeps its blocks and its row
    until then, as the step still writes into them.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_chunk: int | None = None,
        by_priority: bool = False,
        watermark: int = 1,
        swap: SwapSpace | None = None,
        always_swap: bool = False,
    ):
        self.blocks = blocks
        self.swap = swap
        self.always_swap = always_swap
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_chunk = max_chunk or max_num_batched_tokens
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)  # each running sequence gets a token a step
        self.by_priority = by_priority
        self.watermark = watermark  # blocks that an admission leaves free for each sequence that runs
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_in_flight = 0  # steps
        self.leaving: list[Sequence] = []  # finished, but a step in flight computes for them
        self.num_preemptions = 0
        self.num_swaps = 0  # of these, the requests that were swapped
        self.num_tokens_lost = 0  # that the others had computed
        self._num_added = 0
        self._free_rows = list(range(self.max_num_seqs - 1, -1, -1))

    def add(self, request: Request) -> None:
        self._num_added += 1
        request.rank = (request.priority if self.by_priority else 0, self._num_added)
        insort(self.waiting, request, key=_rank)

    def schedule(self) -> Schedule:
        step, work = Schedule(), []
        self.blocks.begin_step()
        if self.by_priority:
            self._make_way()
        budget, block_size = self.max_num_batched_tokens, self.blocks.block_size
        unserved = sum([len(request.active) for request in self.running])

        index = 0
        while index < len(self.running):
            request = self.running[index]
            if request.is_single:  # most of them decode, with room in their last block
                seq = request.active[0]
                num_tokens = len(seq.token_ids)
                if seq.num_cached_tokens == num_tokens - 1 < len(seq.block_table) * block_size:
                    if num_tokens != request.max_len:  # which the step in flight brings it to
                        work.append((seq, 1))
                        budget -= 1
                    unserved -= 1
                    index += 1
                    continue
            own = len(request.active)
            # One token is kept for each sequence that is not served yet.
            limit = own if self.by_priority and self._is_outranked(request) else budget - unserved + own
            num_tokens = self._extend(request, limit, work)
            if num_tokens is not None:
                budget -= num_tokens
                unserved -= own
                index += 1
            elif len(self.running) == 1:
                self._fail(request, step)
            else:
                unserved -= len(self.running[-1].active)
                self.preempt(self.running[-1])  # perhaps `request` itself

        while self.waiting and budget:
            request = self.waiting[0]
            leader, *others = request.unfinished
            if len(others) >= len(self._free_rows):
                break
            spare = self.watermark * (self._num_running_seqs + len(others)) if self.running else 0
            if request.is_swapped:
                if len(request.active) <= budget and self.swap.has_room_for(request, spare, budget):
                    self._check_idle()
                    self.swap.swap_in(request, budget)
                    self._resume_first()
                    budget -= self._extend(request, budget, work)
                elif self.running:
                    break
                else:
                    self._fail(request, step)
                continue
            num_tokens = request.num_shared_tokens if others else len(leader.token_ids)
            found = self.blocks.find_prefix(leader, num_tokens)
            if self.blocks.is_being_computed(leader, len(found), num_tokens):
                break
            if self.running:
                spare += self._num_blocks_to_fork(request)
            if self.blocks.admit(leader, found, num_tokens, spare, budget):
                self._admit_first()
                num_tokens = self._chunk_of(min(num_tokens - leader.num_cached_tokens, budget))
                self.blocks.expect(leader, num_tokens)
                work.append((leader, num_tokens))
                budget -= num_tokens
            elif self.running:
                break
            else:
                self._fail(request, step)

        self._lay_out(step, work)
        if self.swap is not None:
            step.swap_outs, step.swap_ins = self.swap.take_outs(), self.swap.take_ins()
        step.copies = self.blocks.take_copies()
        if step.sequences:
            self.num_in_flight += 1
        return step

    def schedule_ahead(self) -> Schedule:
        """As schedule(), while a step is in flight that is advanced. Nobody computes when somebody would have to be
        preempted or to fail, or to come back from the swap space: that waits until its tokens are known."""
        try:
            return self.schedule()
        except _NeedsTokens:
            # Who was admitted or given blocks by then will use them in the next step; the copies can't wait for it, as
            # their sources may be freed before.
            return Schedule(copies=self.blocks.take_copies())

    def advance(self, step: Schedule) -> None:
        """The step's tokens count as computed: they are for whatever is launched later."""
        step.is_advanced = True
        for seq, num_tokens in zip(step.sequences, step.num_tokens, strict=True):
            if seq.state is FINISHED:
                continue
            self.blocks.advance(seq, num_tokens)
            request = seq.request
            if request.is_forking and seq.num_cached_tokens == request.num_shared_tokens:
                self._fork(request)

    def complete(self, step: Schedule) -> None:
        """The step's tokens are computed, and nothing launched before writes any more."""
        if not step.is_advanced:
            self.advance(step)
        self.num_in_flight -= 1
        for seq in self.leaving:
            self._release(seq)
        self.leaving.clear()
        if self.blocks.window is not None:
            for request in self.running:
                for seq in request.active:
                    self.blocks.free_before_window(seq)

    def replace_beams(self, forks: list[tuple[Sequence, Sequence]], *, are_launched: bool) -> None:
        """The second of each two gives up what it holds, and goes on from where the first one stands.

        are_launched: the step in flight computes the next token of each, the second one's as if it had gone on so.
        """
        for parent, child in forks:
            self.blocks.fork(parent, child, is_launched=are_launched)

    def finish(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """Take `seq` out, whether it runs or waits, and free its blocks."""
        request = seq.request
        is_last = len(request.unfinished) == 1
        request.metrics.num_output_tokens = max(request.metrics.num_output_tokens, seq.num_output_tokens)
        if seq.state is SequenceState.RUNNING:
            self._note_blocks(request)
            if request.is_forking and seq is request.active[0] and not is_last:
                self._hand_over_prompt(request)
            if seq in request.active:
                request.active.remove(seq)
            if self.num_in_flight:
                self.leaving.append(seq)
            else:
                self._release(seq)
            if is_last:
                self.running.remove(request)
        else:
            if seq.state is SequenceState.SWAPPED and seq in request.active:
                if request.is_forking and not is_last:  # nobody else has computed anything: they begin anew
                    self._unswap(request)
                else:
                    self.swap.free(seq)
                    request.active.remove(seq)
            if is_last:
                self.waiting.remove(request)
        seq.state = SequenceState.FINISHED
        seq.finish_reason, seq.stop_reason = reason, stop_reason

    def preempt(self, request: Request) -> None:
        """Send a running request back to wait, without its blocks."""
        self._check_idle()
        self._note_blocks(request)
        self.running.remove(request)
        num_tokens, state = request.num_computed_tokens, SequenceState.WAITING
        if self.swap is not None and (self.always_swap or self.swap.pays(request)) and self.swap.swap_out(request):
            state = SequenceState.SWAPPED
        for seq in request.unfinished:
            if state is SequenceState.WAITING:
                self.blocks.free(seq)
            self._free_rows.append(seq.row)
            seq.row, seq.state = -1, state
        if state is SequenceState.WAITING:
            request.active, request.is_forking = [], False
            self.num_tokens_lost += num_tokens
        else:
            self.num_swaps += 1
        insort(self.waiting, request, key=_rank)
        self.num_preemptions += 1

    def restart(self, waiting: list[Request]) -> None:
        """Nothing runs, and these requests wait, whatever state the books were left in."""
        self.blocks.discard()
        if self.swap is not None:
            self.swap.discard()
        self.running, self.leaving, self.num_in_flight = [], [], 0
        self.waiting = sorted(waiting, key=_rank)
        self._free_rows = list(range(self.max_num_seqs - 1, -1, -1))
        for request in waiting:
            request.active, request.is_forking = [], False
            for seq in request.unfinished:
                seq.block_table, seq.swapped_table, seq.num_cached_tokens, seq.row = [], [], 0, -1
                seq.state = SequenceState.WAITING

    # -- what runs -----------------------------------------------------------------------------------------

    @property
    def _num_running_seqs(self) -> int:
        return self.max_num_seqs - len(self._free_rows)

    def _check_idle(self) -> None:
        if self.num_in_flight:
            raise _NeedsTokens

    def _extend(self, request: Request, limit: int, work: list[tuple[Sequence, int]]) -> int | None:
        """Make room for what the sequences of `request` compute now, `limit` tokens at most, and add it to `work`;
        returns how many tokens, or None, and nothing is added, when blocks lack."""
        start, total = len(work), 0
        left = limit - len(request.active)  # beyond a token for each
        waits = request.search is not None and self._beams_wait(request, limit)
        for seq in request.active:
            num_tokens = request.num_wanted_tokens(seq) - seq.num_cached_tokens - waits
            if num_tokens > 1 + left:
                num_tokens = 1 + left
            if num_tokens > self.max_chunk and (request.search is None or request.is_forking):  # beams stay together
                num_tokens = self._chunk_of(num_tokens)
            if num_tokens == 0 or len(seq.token_ids) == request.max_len:  # which the step in flight brings it to
                continue
            if not self.blocks.allocate_slots(seq, num_tokens):
                del work[start:]
                return None
            if num_tokens > 1:
                left -= num_tokens - 1
                self.blocks.expect(seq, num_tokens)
            work.append((seq, num_tokens))
            total += num_tokens
        return total

    def _chunk_of(self, num_tokens: int) -> int:
        """How many of the next `num_tokens` tokens of a prompt this step computes."""
        if num_tokens <= self.max_chunk or not any(
            seq.num_uncomputed_tokens == 1 for request in self.running if not request.is_forking
            for seq in request.active
        ):  # fmt: skip
            return num_tokens
        return self.max_chunk

    def _beams_wait(self, request: Request, limit: int) -> bool:
        """Whether each beam is to leave its last token uncomputed, because not all beams can reach it in this step."""
        return sum([request.num_wanted_tokens(seq) - seq.num_cached_tokens for seq in request.active]) > limit

    def _fork(self, request: Request) -> None:
        """The prompt is computed: all sequences go on from there, sharing its blocks, or from what the cache still has
        of their outputs before a preemption."""
        leader, *others = request.unfinished
        for seq in others:
            self.blocks.fork(leader, seq)
        for seq in request.unfinished:
            self.blocks.skip_cached(seq)
        request.active, request.is_forking = [leader, *others], False

    def _hand_over_prompt(self, request: Request) -> None:
        """Another sequence computes what is left of the prompt, instead of the first."""
        leader, heir, *_ = request.unfinished
        self.blocks.hand_over(leader, heir)
        request.active.append(heir)

    @staticmethod
    def _note_blocks(request: Request) -> None:
        """For the request's metrics: how many blocks it holds, before it gives up some."""
        tables, metrics = [seq.block_table for seq in request.active], request.metrics
        if sum(map(len, tables)) > metrics.peak_blocks:
            metrics.peak_blocks = max(metrics.peak_blocks, len(set().union(*tables) - {NULL_BLOCK}))

    def _release(self, seq: Sequence) -> None:
        self.blocks.free(seq)
        self._free_rows.append(seq.row)
        seq.row = -1

    def _fail(self, request: Request, step: Schedule) -> None:
        """The device's memory has shrunk below what this request alone needs."""
        self._check_idle()
        for seq in request.unfinished:
            seq.error = f"no memory for more than {self.blocks.pool.num_blocks} KV cache blocks"
            self.finish(seq, "error")
        step.failed.append(request)

    # -- what waits ----------------------------------------------------------------------------------------

    def _resume_first(self) -> Request:
        request = self.waiting.pop(0)
        insort(self.running, request, key=_rank)
        for seq in request.unfinished:
            seq.state = SequenceState.RUNNING
            seq.row = self._free_rows.pop()
        return request

    def _admit_first(self) -> None:
        request = self._resume_first()
        leader, *others = request.unfinished
        request.is_forking = bool(others)
        request.active = [leader]
        if request.num_cached_tokens is None:
            request.num_cached_tokens = leader.num_cached_tokens

    def _unswap(self, request: Request) -> None:
        """Send a swapped request back to wait as if it were new."""
        for seq in request.unfinished:
            self.swap.free(seq)
            seq.num_cached_tokens, seq.state = 0, SequenceState.WAITING
        request.active, request.is_forking = [], False

    def _is_outranked(self, request: Request) -> bool:
        """Whether a request of higher priority waits."""
        return bool(self.waiting) and self.waiting[0].rank[0] < request.rank[0]

    def _num_blocks_to_fork(self, request: Request) -> int:
        """Blocks that the sequences of a waiting group will want beside the shared ones, for what they had generated
        when they were preempted. A group that is admitted without them is soon preempted again."""
        if len(request.unfinished) == 1:
            return 0
        block_size = self.blocks.block_size
        shared = -(-request.num_shared_tokens // block_size)
        return sum(-(-len(seq.token_ids) // block_size) - shared for seq in request.unfinished)

    def _make_way(self) -> None:
        """Preempt requests of lower priority than the first that waits, as far as it needs their blocks and rows."""
        while self.running and self._is_outranked(self.running[-1]):
            request = self.waiting[0]
            leader, *others = request.unfinished
            if request.is_swapped:
                num_blocks = self.swap.num_blocks_to_resume(request, self.max_num_batched_tokens)
            else:
                num_tokens = request.num_shared_tokens if others else len(leader.token_ids)
                end = self.blocks.end_of_room(0, num_tokens, self.max_num_batched_tokens)
                num_blocks = -(-end // self.blocks.block_size) + self._num_blocks_to_fork(request)
            # Those that run on may take a block each before it is admitted, and the watermark is to be left then.
            num_blocks += self._num_running_seqs + self.watermark * (self._num_running_seqs + len(others))
            if len(others) < len(self._free_rows) and self.blocks.pool.can_allocate(num_blocks):
                break
            self.preempt(self.running[-1])

    # -- the step ------------------------------------------------------------------------------------------

    @staticmethod
    def _lay_out(step: Schedule, work: list[tuple[Sequence, int]]) -> None:
        """Sequences with one token before those with more."""
        step.sequences = [seq for seq, num_tokens in work if num_tokens == 1]
        step.num_decodes = len(step.sequences)
        step.num_tokens = [1] * step.num_decodes
        if len(work) > step.num_decodes:
            step.sequences += [seq for seq, num_tokens in work if num_tokens > 1]
            step.num_tokens += [num_tokens for _, num_tokens in work if num_tokens > 1]
        step.sampled = sampled = [
            (i, seq)
            for i, (seq, num_tokens) in enumerate(zip(step.sequences, step.num_tokens, strict=True))
            if seq.num_cached_tokens + num_tokens == len(seq.token_ids)
        ]
        if any([seq.request.is_forking for _, seq in sampled]):
            step.sampled = [
                (i, other)
                for i, seq in sampled
                for other in (
                    seq.request.unfinished if seq.request.is_forking and seq.request.search is None else [seq]
                )
            ]


def _rank(request: Request) -> tuple[int, int]:
    return request.rank
