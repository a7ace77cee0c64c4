"""Block tables: which blocks hold a sequence's keys and values."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from cupaged.engine.batch import Batch
from cupaged.engine.block_pool import NULL_BLOCK, Block, BlockPool
from cupaged.engine.prefix import PrefixHasher
from cupaged.engine.sequence import Sequence


class BlockManager:
    """Gives sequences their blocks, and lets them share what they have in common.

    Blocks come to be shared in two ways: by `fork`, the last one perhaps half full, and by a prefix that is found in
    the cache, full ones only. Whoever writes into a block that others hold as well gets a copy of it first; the last
    holder writes into the original.

    With a sliding window, a sequence gives up the blocks that none of its next tokens attends to, and its table has
    NULL_BLOCK in their places. They stay in the cache as all free blocks do, and a prefix is found only as long as it
    is there from its first block on, though a part may lie before the window and be given up at once.

    hasher: names the contents of full blocks; None shares nothing between requests. window: of the model, in tokens.
    """

    def __init__(self, pool: BlockPool, block_size: int, hasher: PrefixHasher | None = None, window: int | None = None):
        self.pool = pool
        self.block_size = block_size  # tokens
        self.hasher = hasher
        self.window = window
        self.num_copies = 0  # blocks copied on write so far
        self._copies: dict[int, int] = {}  # destination -> source, to be copied before this step computes
        self._computing: set[bytes] = set()  # digests of the blocks that chunks of this step fill

    def begin_step(self) -> None:
        self._computing.clear()

    # -- a sequence's blocks -------------------------------------------------------------------------------

    def find_prefix(self, seq: Sequence, num_tokens: int) -> list[Block]:
        """The cached blocks with which `seq` may begin when it is to compute its first `num_tokens` tokens. Those
        whose logits are wanted, the last one at least, are not covered."""
        blocks: list[Block] = []
        if self.hasher is None:
            return blocks
        request = seq.request
        self.hasher.extend(seq.prefix, seq.token_ids, request.prefix_key)
        link = request.prefix_key
        for prefix in seq.prefix[: request.num_reusable_tokens(num_tokens) // self.block_size]:
            block = self.pool.find(prefix, link)
            if block is None:
                break
            blocks.append(block)
            link = block.content.serial
        return blocks

    def is_being_computed(self, seq: Sequence, num_found: int, num_tokens: int) -> bool:
        """Whether the block that find_prefix lacked is filled by this very step, and will be there in the next."""
        return (
            num_found < min(len(seq.prefix), seq.request.num_reusable_tokens(num_tokens) // self.block_size)
            and seq.prefix[num_found].digest in self._computing
        )

    def end_of_room(self, num_cached_tokens: int, num_tokens: int, limit: int) -> int:
        """Up to which token a sequence gets room at once that is to compute all up to `num_tokens` after so many cached
        ones, at most `limit` a step: up to the last; with a window only as much as it holds at a time, from the first
        token that the next one attends to, since more blocks leave the window as it gets on."""
        if self.window is None:
            return num_tokens
        return min(num_tokens, max(0, num_cached_tokens + 1 - self.window) + self.window + limit)

    def admit(self, seq: Sequence, found: list[Block], num_tokens: int, spare: int, limit: int) -> bool:
        """Let `seq` begin with the blocks `found`, and make room to compute up to token `num_tokens`, at most `limit`
        tokens a step; False, and nothing taken, unless `spare` blocks are left then.

        |<-- found, shared -->|<-- taken -->|
        |<-- cached tokens -->|             ^ end_of_room
        """
        end = self.end_of_room(len(found) * self.block_size, num_tokens, limit)
        shared = [block.block_id for block in found]
        self.pool.share(shared)  # first, so that taking others can't evict them
        missing = -(-end // self.block_size) - len(shared)
        if not self.pool.can_allocate(missing + spare):
            self.pool.free(reversed(shared))
            return False
        self._begin_with(seq, found, self.pool.allocate(missing))
        return True

    def allocate_slots(self, seq: Sequence, num_tokens: int) -> bool:
        """Make room for the next `num_tokens` tokens of `seq`; False when the pool has too few blocks. Whatever was
        got by then `seq` keeps, so that another call asks for the rest only.

        |<-- num_cached_tokens -->|<-- num_tokens -->|
        |<-- blocks in seq.block_table -->|<- taken ->|
                             |<- if shared: copied
        """
        block_size, table = self.block_size, seq.block_table
        first = seq.num_cached_tokens // block_size  # the first block that is written to
        if first < len(table) and self.pool.ref_count(table[first]) > 1:
            if not self._copy_on_write(seq, first):
                return False
            table = seq.block_table
        missing = -(-(seq.num_cached_tokens + num_tokens) // block_size) - len(table)
        if missing > 0:
            block_ids = self.pool.allocate(missing)
            if block_ids is None:
                return False
            table.extend(block_ids)
        return True

    def fork(self, parent: Sequence, child: Sequence, *, is_launched: bool = False) -> None:
        """`child` gives up what it holds for all that `parent` has computed. Its tokens begin with those.

        is_launched: the next token of each is being computed in a block of its own. child keeps that one, to which what
        parent has computed of its own was copied.

        Only the blocks in which the two differ are touched. parent's table stays as it is.
        """
        end, kept = -(-parent.num_cached_tokens // self.block_size), []
        if is_launched:
            end = parent.num_cached_tokens // self.block_size
            kept = child.block_table[end:]
        old, new = child.block_table[: len(child.block_table) - len(kept)], parent.block_table[:end]
        num_common = _num_common(old, new)
        self.pool.share(new[num_common:])
        self.pool.free(reversed(old[num_common:]))
        child.block_table = new + kept
        child.num_cached_tokens = parent.num_cached_tokens
        child.prefix = parent.prefix[: parent.num_cached_tokens // self.block_size]
        child.num_registered_blocks, child.link = parent.num_registered_blocks, parent.link

    def skip_cached(self, seq: Sequence) -> None:
        """If the cache has more of `seq` than it has computed, let it go on from there."""
        if seq.num_uncomputed_tokens == 0:
            return
        found = self.find_prefix(seq, len(seq.token_ids))
        if len(found) * self.block_size > seq.num_cached_tokens:
            self.pool.share([block.block_id for block in found])
            self.pool.free(reversed(seq.block_table))
            self._begin_with(seq, found)

    def hand_over(self, seq: Sequence, heir: Sequence) -> None:
        """`heir`, which holds nothing, gets all that `seq` has: what is computed, and room for what is not."""
        heir.block_table, seq.block_table = seq.block_table, []
        heir.num_cached_tokens, seq.num_cached_tokens = seq.num_cached_tokens, 0
        heir.prefix = seq.prefix[: heir.num_cached_tokens // self.block_size]  # beyond, outputs may differ
        heir.num_registered_blocks, heir.link = seq.num_registered_blocks, seq.link

    def free(self, seq: Sequence) -> None:
        """Give up the cache of `seq`, its last block first: what comes late in a sequence is missed least."""
        block_table, seq.block_table, seq.num_cached_tokens = seq.block_table, [], 0
        if self._copies:
            for block_id in block_table:
                self._copies.pop(block_id, None)
        self.pool.free(reversed(block_table))

    def first_needed_block(self, num_cached_tokens: int) -> int:
        """The first block that the tokens after so many cached ones attend to."""
        return 0 if self.window is None else max(0, num_cached_tokens + 1 - self.window) // self.block_size

    def free_before_window(self, seq: Sequence) -> None:
        """Give up the blocks that are before the window of the next token."""
        start = end = self.first_needed_block(seq.num_cached_tokens)
        while start > 0 and seq.block_table[start - 1] != NULL_BLOCK:
            start -= 1
        if end > start:
            self.pool.free(reversed(seq.block_table[start:end]))
            seq.block_table[start:end] = [NULL_BLOCK] * (end - start)

    def source_of(self, block_id: int) -> int:
        """The block that holds the contents of this one, which may be a copy that is not made yet."""
        return self._copies.get(block_id, block_id)

    def _begin_with(self, seq: Sequence, found: list[Block], others: Iterable[int] = ()) -> None:
        """The table of `seq` is made of blocks with its first tokens, which it shares already, and of others."""
        seq.block_table = [*(block.block_id for block in found), *others]
        seq.num_cached_tokens = len(found) * self.block_size
        seq.num_registered_blocks = len(found)
        seq.link = found[-1].content.serial if found else seq.request.prefix_key
        self.free_before_window(seq)

    def _copy_on_write(self, seq: Sequence, index: int) -> bool:
        block_ids = self.pool.allocate(1)
        if block_ids is None:
            return False
        source = seq.block_table[index]
        # A new list tells BatchBuilder that it is not the old one with something added.
        seq.block_table = [*seq.block_table[:index], *block_ids, *seq.block_table[index + 1 :]]
        self.pool.free([source])  # the others hold it still
        self._copies[block_ids[0]] = source
        return True

    # -- a step --------------------------------------------------------------------------------------------

    def take_copies(self) -> list[tuple[int, int]]:
        """(source, destination) of the blocks to be copied before this step computes."""
        copies = [(source, destination) for destination, source in self._copies.items()]
        self._copies.clear()
        self.num_copies += len(copies)
        return copies

    def copies_of_forks(self, batch: Batch, parents: list[int], children: list[int]) -> np.ndarray:
        """Let rows of a batch follow others of it, as `fork` with is_launched will do with their sequences; returns
        (source, destination) of the blocks to be copied before the batch is computed, [n, 2] int32."""
        tables, parents, children = batch.block_tables, np.array(parents), np.array(children)
        columns, offsets = np.divmod(batch.positions[parents], self.block_size)
        copies = np.empty((len(parents), 2), np.int32)
        copies[:, 0] = tables[parents, columns]
        copies[:, 1] = kept = tables[children, columns]
        tables[children] = tables[parents]
        tables[children, columns] = kept
        copies = copies[offsets != 0]  # the others have not begun a block
        self.num_copies += len(copies)
        return copies

    def expect(self, seq: Sequence, num_tokens: int) -> None:
        """Take note that this step computes the next `num_tokens` tokens of `seq`."""
        if self.hasher is not None and seq.link is not None:
            start = seq.num_cached_tokens
            full = seq.prefix[start // self.block_size : (start + num_tokens) // self.block_size]
            self._computing.update(prefix.digest for prefix in full)

    def advance(self, seq: Sequence, num_tokens: int) -> None:
        """The next `num_tokens` tokens of `seq` are computed now. Blocks that are full become findable, not before:
        nobody can read what is not written yet."""
        end = seq.num_cached_tokens = seq.num_cached_tokens + num_tokens
        if end >= (seq.num_registered_blocks + 1) * self.block_size:
            self._register(seq, end // self.block_size)

    def reset_prefix_cache(self, sequences: list[Sequence]) -> None:
        """Forget all contents, and do not take up those that these sequences compute on top of them."""
        self.pool.forget_all()
        for seq in sequences:
            seq.link = None

    def discard(self) -> None:
        """No sequence holds blocks any more, whatever state the books were left in."""
        self._copies.clear()
        self.pool.free_all()

    def _register(self, seq: Sequence, end: int) -> None:
        if self.hasher is not None and seq.link is not None:
            self.hasher.extend(seq.prefix, seq.token_ids, seq.request.prefix_key)
            for i in range(seq.num_registered_blocks, end):
                seq.link = self.pool.register(seq.block_table[i], seq.prefix[i], seq.link)
        seq.num_registered_blocks = end


def _num_common(a: list[int], b: list[int]) -> int:
    """How many elements the two begin with in common: halving, since slices are compared faster than elements."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
