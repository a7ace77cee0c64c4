"""Blocks of preempted requests in the host's memory: what goes there, what comes back, and whether that pays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain

from cupaged.engine.block_manager import BlockManager
from cupaged.engine.block_pool import NULL_BLOCK, BlockPool
from cupaged.engine.sequence import Request, Sequence

# Of the bus until a copy has been measured: about half of what PCIe 4.0 with 16 lanes does.
ASSUMED_BYTES_PER_SECOND = 12e9
# Of a model's prompts until one has been measured. Whatever is preempted was computed before, so nothing hangs on it.
ASSUMED_TOKENS_PER_SECOND = 10e3


class Rate:
    """How many units a second were done: what is measured replaces the guess, and what is recent counts most."""

    def __init__(self, guess: float):
        self._units, self._seconds = guess, 1.0
        self._is_guess = True

    def add(self, units: float, seconds: float) -> None:
        kept = 0.0 if self._is_guess else 0.8
        self._is_guess = False
        self._units = kept * self._units + units
        self._seconds = kept * self._seconds + max(seconds, 1e-9)

    @property
    def per_second(self) -> float:
        return self._units / self._seconds


class SwapSpace:
    """Keeps blocks of preempted requests, so that they need not be computed again.

    A request's sequences go out and come back together; a block that several hold is kept once, and shared again
    afterwards. Blocks come back with other ids. Nothing is copied here: the copies of a step are collected, and must
    be done in this order before anything else writes into the cache:

    1. those to the host, as the blocks that they read may be in new hands already;
    2. those from the host;
    3. the copies on write, which may read what came back.

    pool: of the space's own blocks. bytes_per_block: of either.
    """

    def __init__(self, blocks: BlockManager, pool: BlockPool, bytes_per_block: int):
        self.blocks = blocks
        self.pool = pool
        self.bytes_per_block = bytes_per_block
        self.copy_rate = Rate(ASSUMED_BYTES_PER_SECOND)
        self.prefill_rate = Rate(ASSUMED_TOKENS_PER_SECOND)
        self._outs: dict[int, int] = {}  # block here -> block of the cache that is copied to it
        self._ins: list[tuple[int, int]] = []  # (block here, block of the cache)

    def pays(self, request: Request) -> bool:
        """Whether copying what `request` has computed out and in again takes less time than computing it again:

            2 * bytes / copy_rate < tokens / prefill_rate

        with the rates of this engine's own copies, and of its own steps with a prompt in them.
        """
        held = _distinct(self._computed_blocks(seq) for seq in request.active)
        num_bytes = 2 * len(held) * self.bytes_per_block
        return num_bytes / self.copy_rate.per_second < request.num_computed_tokens / self.prefill_rate.per_second

    def swap_out(self, request: Request) -> bool:
        """Move what `request` has computed here, out of the cache; False, and nothing done, if there is no room."""
        held = _distinct(self._computed_blocks(seq) for seq in request.active)
        kept = self.pool.allocate(len(held))
        if not kept:
            return False
        self._outs.update(zip(kept, held, strict=True))
        copy_of = {NULL_BLOCK: NULL_BLOCK, **dict(zip(held, kept, strict=True))}
        for seq in request.active:
            seq.swapped_table = [copy_of[block_id] for block_id in self._computed_blocks(seq)]
            self.pool.share(seq.swapped_table)
        for seq in request.active:
            num_cached_tokens = seq.num_cached_tokens
            self.blocks.free(seq)
            seq.num_cached_tokens = num_cached_tokens
        self.pool.free(kept)  # the tables hold them now
        return True

    def num_blocks_to_resume(self, request: Request, limit: int) -> int:
        """Blocks of the cache that `request` needs to come back and compute all that it has not computed, each sequence
        at most `limit` tokens a step."""
        block_size = self.blocks.block_size
        needed, written = len(_distinct(seq.swapped_table for seq in request.active)), Counter()
        for seq in request.active:
            needed += self._num_blocks(seq, limit) - len(seq.swapped_table)
            if seq.num_cached_tokens % block_size:
                written[seq.swapped_table[-1]] += 1
        return needed + sum(sharers - 1 for sharers in written.values())  # all but one of them get a copy

    def has_room_for(self, request: Request, spare: int, limit: int) -> bool:
        """Whether `spare` blocks of the cache are left when `request` has come back, with room for all that it has not
        computed, each sequence at most `limit` tokens a step."""
        return self.blocks.pool.can_allocate(self.num_blocks_to_resume(request, limit) + spare)

    def swap_in(self, request: Request, limit: int) -> None:
        """Give `request` its blocks back, and room for what it has not computed, as in has_room_for."""
        pool = self.blocks.pool
        kept = _distinct(seq.swapped_table for seq in request.active)
        restored = pool.allocate(len(kept))
        self._ins += zip(kept, restored, strict=True)
        block_of = {NULL_BLOCK: NULL_BLOCK, **dict(zip(kept, restored, strict=True))}
        for seq in request.active:
            table = [block_of[block_id] for block_id in seq.swapped_table]
            pool.share(table)
            seq.block_table = table + pool.allocate(self._num_blocks(seq, limit) - len(table))
            # It has other blocks now, which can be found when they are written; unless the first are not there, on
            # which the others hang.
            seq.num_registered_blocks = 0
            seq.link = None if seq.link is None or NULL_BLOCK in table else request.prefix_key
            self.pool.free(seq.swapped_table)
            seq.swapped_table = []
        pool.free(restored)  # the tables hold them now

    def free(self, seq: Sequence) -> None:
        """Give up what is kept of `seq`."""
        self.pool.free(reversed(seq.swapped_table))
        for block_id in _distinct([seq.swapped_table]):
            if self.pool.ref_count(block_id) == 0:
                self._outs.pop(block_id, None)
        seq.swapped_table = []

    def take_outs(self) -> list[tuple[int, int]]:
        """(block of the cache, block here) of the copies to the host."""
        outs = [(block_id, copy) for copy, block_id in self._outs.items()]
        self._outs.clear()
        return outs

    def take_ins(self) -> list[tuple[int, int]]:
        """(block here, block of the cache) of the copies from the host."""
        ins, self._ins = self._ins, []
        return ins

    def discard(self) -> None:
        """Nothing is kept any more, whatever state the books were left in."""
        self._outs.clear()
        self._ins.clear()
        self.pool.free_all()

    def _num_blocks(self, seq: Sequence, limit: int) -> int:
        """How many its table has when it is back."""
        num_tokens = seq.request.num_wanted_tokens(seq)
        return -(-self.blocks.end_of_room(seq.num_cached_tokens, num_tokens, limit) // self.blocks.block_size)

    def _computed_blocks(self, seq: Sequence) -> list[int]:
        """Where what `seq` has computed lies now: one of the blocks may be a copy that is not made yet."""
        num_blocks = -(-seq.num_cached_tokens // self.blocks.block_size)
        return [self.blocks.source_of(block_id) for block_id in seq.block_table[:num_blocks]]


def _distinct(tables: Iterable[list[int]]) -> list[int]:
    """The blocks that are in any of the tables, each once."""
    return [block_id for block_id in dict.fromkeys(chain.from_iterable(tables)) if block_id != NULL_BLOCK]
