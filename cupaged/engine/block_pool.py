"""The host-side truth about the KV cache's blocks: which are free, how often the others are referenced, and which of
them can be found by their content."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cupaged.engine.prefix import Link, PrefixBlock

NULL_BLOCK = -1  # in a block table: what was there is not needed any more


@dataclass(frozen=True, slots=True)
class Content:
    """What a findable block holds: the tokens of `prefix`, behind those that `parent` stands for."""

    prefix: PrefixBlock
    parent: Link
    serial: int  # stands for this block's tokens and all before them; never given twice


class Block:
    """One block's reference count and content and, while it is free, its neighbours in a free queue."""

    __slots__ = ("block_id", "content", "next", "prev", "ref_count", "slab")

    def __init__(self, block_id: int, slab: Slab | None = None):
        self.block_id = block_id
        self.slab = slab
        self.ref_count = 0
        self.content: Content | None = None  # None while it can't be found
        self.prev: Block | None = None
        self.next: Block | None = None


class FreeQueue:
    """Free blocks in the order in which they are handed out: the one that has been free for the longest first.

    A doubly linked list whose links live in the blocks, between two sentinels: every operation is O(1) and none
    has a special case for the ends.
    """

    def __init__(self):
        self._head = Block(-1)
        self._tail = Block(-1)
        self._head.next = self._tail
        self._tail.prev = self._head
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def append(self, block: Block) -> None:
        last = self._tail.prev
        last.next = self._tail.prev = block
        block.prev, block.next = last, self._tail
        self._len += 1

    def remove(self, block: Block) -> None:
        block.prev.next, block.next.prev = block.next, block.prev
        block.prev = block.next = None
        self._len -= 1

    def popleft(self) -> Block:
        """The first block; the caller has made sure that there is one."""
        block = self._head.next
        self.remove(block)
        return block

    def __iter__(self):
        block = self._head.next
        while block is not self._tail:
            yield block
            block = block.next


class Slab:
    """The blocks that got their memory together, and can only give it back together."""

    def __init__(self, index: int, first_block: int, num_blocks: int):
        self.index = index
        self.block_ids = range(first_block, first_block + num_blocks)
        self.has_memory = False
        self.unused = FreeQueue()  # its free blocks that hold nothing of use
        self.num_used = 0  # blocks with a reference
        self.idle_since = 0.0  # on time.monotonic()'s clock, while there are none


class BlockPool:
    """Hands out block ids 0, 1, 2, ... and grows when they run out.

    A free block is in one of two queues. Those whose content can be found are cached: they may be shared again,
    until they are handed out anew. Blocks are handed out in this order:

    1. free ones that hold nothing of use: they cost nothing. Those of the lowest slab first, so that the highest ones
       become empty, and can be given back;
    2. new ones: memory that the cache may take is there to be used, and a hit saves more than growth costs;
    3. cached ones, the least recently used first: now somebody's hit has to go. A sequence frees its last block
       first, so of one prefix the tail goes before what it hangs on, without which it could not be found.

    grow: called when blocks of kind 1 lack; returns how many blocks it added to the cache, 0 when it is full. They make
    a slab, the lowest that had no memory.
    """

    def __init__(self, grow: Callable[[], int]):
        self._grow = grow
        self._slabs: list[Slab] = []  # also those whose memory was given back
        self._blocks: list[Block | None] = []  # by block id; None where there is no memory
        self._num_blocks = 0
        self._num_unused = 0
        self._slabs_with_unused = 0  # bit i: slab i has unused blocks
        self._cached = FreeQueue()
        self._by_digest: dict[bytes, Block] = {}
        self._last_serial = 0
        self.num_references = 0  # the sum of all reference counts
        self.num_evictions = 0
        self.handed_out: list[int] | None = None  # if a list, blocks are noted in it when they are handed out

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks without a reference, the cached ones among them."""
        return self._num_unused + len(self._cached)

    @property
    def num_cached_blocks(self) -> int:
        return len(self._cached)

    def ref_count(self, block_id: int) -> int:
        """0 means free."""
        return self._blocks[block_id].ref_count

    def content(self, block_id: int) -> Content | None:
        return self._blocks[block_id].content

    def block_ids(self) -> list[int]:
        """All blocks, in order. Where memory was given back, ids are missing."""
        return [block.block_id for block in self._blocks if block is not None]

    def unused_blocks(self) -> list[int]:
        """The free blocks that hold nothing of use."""
        return [block.block_id for slab in self._slabs for block in slab.unused]

    def cached_blocks(self) -> list[int]:
        """The free blocks that can be found, in the order in which they would be evicted."""
        return [block.block_id for block in self._cached]

    # -- slabs ---------------------------------------------------------------------------------------------

    def add_blocks(self, count: int, index: int | None = None) -> None:
        """Take note of one more slab of `count` blocks, all free. index: which slab; by default the first that has no
        memory."""
        if index is None:
            index = next((slab.index for slab in self._slabs if not slab.has_memory), len(self._slabs))
        if index == len(self._slabs):
            self._slabs.append(Slab(index, len(self._blocks), count))
            self._blocks += [None] * count
        slab = self._slabs[index]
        for block_id in slab.block_ids:
            self._blocks[block_id] = Block(block_id, slab)
        slab.has_memory, slab.num_used, slab.idle_since = True, 0, time.monotonic()
        self._num_blocks += count
        for block_id in slab.block_ids:
            self._queue(self._blocks[block_id])

    def has_slab(self, index: int) -> bool:
        return index < len(self._slabs) and self._slabs[index].has_memory

    def idle_slabs(self, since: float) -> list[int]:
        """The slabs of which no block has been in use since then, on time.monotonic()'s clock."""
        return [s.index for s in self._slabs if s.has_memory and s.num_used == 0 and s.idle_since <= since]

    def remove_slab(self, index: int) -> None:
        """Forget an idle slab, whose memory is to be given back, and all that its blocks hold."""
        slab = self._slabs[index]
        if slab.num_used:
            raise RuntimeError(f"slab {index} is removed, but {slab.num_used} of its blocks are in use")
        for block_id in slab.block_ids:
            block = self._blocks[block_id]
            if block.content is not None:
                self._cached.remove(block)
                self._drop_content(block)
                self.num_evictions += 1
        slab.has_memory = False
        self._num_unused -= len(slab.unused)
        self._num_blocks -= len(slab.block_ids)
        self._slabs_with_unused &= ~(1 << index)
        slab.unused = FreeQueue()
        for block_id in slab.block_ids:
            self._blocks[block_id] = None

    # -- references ----------------------------------------------------------------------------------------

    def can_allocate(self, count: int) -> bool:
        """Whether there are `count` free blocks; grows the cache if that helps."""
        while self.num_free_blocks < count:
            if not self._add_slab():
                return False
        return True

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each; None, and nothing taken, when there are not so many."""
        while self._num_unused < count and self._add_slab():
            pass
        if self.num_free_blocks < count:
            return None
        block_ids = []
        for _ in range(count):
            if self._num_unused:
                block = self._take_unused()
            else:
                block = self._cached.popleft()
                self._drop_content(block)
                self.num_evictions += 1
            block.ref_count = 1
            block.slab.num_used += 1
            block_ids.append(block.block_id)
        self.num_references += count
        if self.handed_out is not None:
            self.handed_out += block_ids
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """One more reference to each of these blocks, which are in use already, or cached; NULL_BLOCK is skipped."""
        for block_id in block_ids:
            if block_id == NULL_BLOCK:
                continue
            block = self._blocks[block_id]
            if block.ref_count == 0:
                if block.content is None:
                    raise RuntimeError(f"block {block_id} is shared, but it is free")
                self._cached.remove(block)
                block.slab.num_used += 1
            block.ref_count += 1
            self.num_references += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """One reference less; the blocks without any left go to the end of their queue, in this order. NULL_BLOCK is
        skipped."""
        for block_id in block_ids:
            if block_id == NULL_BLOCK:
                continue
            block = self._blocks[block_id]
            if block.ref_count == 0:
                raise RuntimeError(f"block {block_id} is freed twice")
            block.ref_count -= 1
            self.num_references -= 1
            if block.ref_count == 0:
                self._queue(block)
                slab = block.slab
                slab.num_used -= 1
                if slab.num_used == 0:
                    slab.idle_since = time.monotonic()

    def free_all(self) -> None:
        """No block has a reference any more, whatever state the books were left in."""
        self._cached = FreeQueue()
        self._num_blocks = self._num_unused = self._slabs_with_unused = 0
        blocks: list[Block] = []
        for slab in self._slabs:
            slab.unused, slab.num_used, slab.idle_since = FreeQueue(), 0, time.monotonic()
            if slab.has_memory:
                blocks += self._blocks[slab.block_ids.start : slab.block_ids.stop]
                self._num_blocks += len(slab.block_ids)
            else:
                self._blocks[slab.block_ids.start : slab.block_ids.stop] = [None] * len(slab.block_ids)
        self._by_digest = {block.content.prefix.digest: block for block in blocks if block.content is not None}
        for block in blocks:
            block.ref_count = 0
            if block.content is not None and self._by_digest[block.content.prefix.digest] is not block:
                block.content = None
            self._queue(block)
        self.num_references = 0

    # -- contents ------------------------------------------------------------------------------------------

    def find(self, prefix: PrefixBlock, parent: Link) -> Block | None:
        """The block that holds the tokens of `prefix` behind those of `parent`.

        The digest finds it; the tokens and the parent are compared, so a collision of digests is a miss.
        """
        block = self._by_digest.get(prefix.digest)
        if block is None or block.content.prefix.tokens != prefix.tokens or block.content.parent != parent:
            return None
        return block

    def register(self, block_id: int, prefix: PrefixBlock, parent: Link) -> int:
        """Make a block findable, which is in use and computed; returns what stands for its content as a parent.

        One block holds each content: if another one has the same and is in use, that stays the one to be found; if it
        is free, this block takes over, as it is used more recently. One of the same digest that holds something else
        can't be found any more.
        """
        block, content = self._blocks[block_id], None
        other = self._by_digest.get(prefix.digest)
        if other is not None:
            if self.find(prefix, parent) is not None:
                content = other.content
                if other.ref_count > 0:
                    return content.serial
            self._forget(other)
        if content is None:
            self._last_serial += 1
            content = Content(prefix, parent, self._last_serial)
        block.content = content
        self._by_digest[prefix.digest] = block
        return content.serial

    def forget_all(self) -> None:
        """No block can be found any more."""
        for block in list(self._by_digest.values()):
            self._forget(block)

    def _forget(self, block: Block) -> None:
        if block.ref_count == 0:
            self._cached.remove(block)
            self._drop_content(block)
            self._queue(block)
        else:
            self._drop_content(block)

    def _drop_content(self, block: Block) -> None:
        del self._by_digest[block.content.prefix.digest]
        block.content = None

    def _queue(self, block: Block) -> None:
        """Put a free block at the end of its queue."""
        if block.content is not None:
            self._cached.append(block)
            return
        slab = block.slab
        slab.unused.append(block)
        self._slabs_with_unused |= 1 << slab.index
        self._num_unused += 1

    def _take_unused(self) -> Block:
        slab = self._slabs[(self._slabs_with_unused & -self._slabs_with_unused).bit_length() - 1]  # the lowest one
        block = slab.unused.popleft()
        if not slab.unused:
            self._slabs_with_unused ^= 1 << slab.index
        self._num_unused -= 1
        return block

    def _add_slab(self) -> bool:
        added = self._grow()
        if added:
            self.add_blocks(added)
        return added > 0
