"""Which sequences run in a step, and how many tokens each: first come, first served, with continuous batching."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from cupaged.engine.block_manager import BlockManager
from cupaged.engine.sequence import Sequence, SequenceState


@dataclass
class Schedule:
    """One step: sequences[i] computes its next num_tokens[i] tokens. Those that compute one stand first."""

    sequences: list[Sequence] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    num_decodes: int = 0  # leading sequences with one token
    failed: list[Sequence] = field(default_factory=list)  # finished instead: no memory, even with nothing else running

    @property
    def sampled(self) -> list[int]:
        """Indices of the sequences that compute their last known token: the next one is drawn from its logits."""
        pairs = zip(self.sequences, self.num_tokens, strict=True)
        return [i for i, (seq, n) in enumerate(pairs) if n == seq.num_uncomputed_tokens]


class Scheduler:
    """Both `running` and `waiting` are in the order of arrival, and whoever runs came before whoever waits.

    - Decodes come first. What they leave of the token budget goes to prompts, in chunks if need be. A prompt is
      admitted only while budget is left, so at most one prompt, the newest running sequence, is half computed.
    - A prompt's blocks are taken at its admission, all or none; a block for output when the last one is full.
    - When there is none, the newest running sequence is preempted: it loses its blocks, goes back to the front of
      `waiting` and is computed again later. The oldest one therefore always gets on, and every request becomes the
      oldest some day.
    """

    def __init__(self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int):
        self.blocks = blocks
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)  # each running sequence gets a token a step
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._free_rows = list(range(self.max_num_seqs - 1, -1, -1))

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def schedule(self) -> Schedule:
        step, chunks = Schedule(), []
        budget = self.max_num_batched_tokens

        def take(seq: Sequence) -> None:
            nonlocal budget
            num_tokens = min(seq.num_uncomputed_tokens, budget)
            budget -= num_tokens
            if num_tokens == 1:
                step.sequences.append(seq)
            else:
                chunks.append((seq, num_tokens))

        index = 0
        while index < len(self.running):
            seq = self.running[index]
            if self.blocks.allocate_slots(seq, min(seq.num_uncomputed_tokens, budget)):
                take(seq)
                index += 1
            elif len(self.running) == 1:
                self._fail(seq, step)
            else:
                self._preempt_newest()  # perhaps `seq` itself

        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if self.blocks.allocate_slots(seq, seq.num_uncomputed_tokens):
                self._admit_first()
                take(seq)
            elif self.running:
                break
            else:
                self._fail(seq, step)

        step.num_decodes = len(step.sequences)
        step.num_tokens = [1] * step.num_decodes
        for seq, num_tokens in chunks:
            step.sequences.append(seq)
            step.num_tokens.append(num_tokens)
        return step

    def finish(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """Take `seq` out, whether it runs or waits, and free its blocks."""
        if seq.state is SequenceState.RUNNING:
            self.running.remove(seq)
            self._release(seq)
        else:
            self.waiting.remove(seq)
        seq.state = SequenceState.FINISHED
        seq.finish_reason, seq.stop_reason = reason, stop_reason

    def _admit_first(self) -> None:
        seq = self.waiting.popleft()
        self.running.append(seq)
        seq.state = SequenceState.RUNNING
        seq.row = self._free_rows.pop()

    def _preempt_newest(self) -> None:
        seq = self.running.pop()
        self._release(seq)
        seq.state = SequenceState.WAITING
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def _release(self, seq: Sequence) -> None:
        self.blocks.free(seq)
        self._free_rows.append(seq.row)
        seq.row = -1

    def _fail(self, seq: Sequence, step: Schedule) -> None:
        """The device's memory has shrunk below what this sequence alone needs."""
        seq.error = f"no memory for more than {self.blocks.pool.num_blocks} KV cache blocks"
        self.finish(seq, "error")
        step.failed.append(seq)
