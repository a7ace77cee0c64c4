"""The host-side truth about the KV cache's blocks: which are free, how often the others are referenced, and which of
them can be found by their content."""

from __future__ import annotations

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

    __slots__ = ("block_id", "content", "next", "prev", "ref_count")

    def __init__(self, block_id: int):
        self.block_id = block_id
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


class BlockPool:
    """Hands out block ids 0, 1, 2, ... and grows when they run out.

    A free block is in one of two queues. Those whose content can be found are cached: they may be shared again,
    until they are handed out anew. Blocks are handed out in this order:

    1. free ones that hold nothing of use: they cost nothing;
    2. new ones: memory that the cache may take is there to be used, and a hit saves more than growth costs;
    3. cached ones, the least recently used first: now somebody's hit has to go. A sequence frees its last block
       first, so of one prefix the tail goes before what it hangs on, without which it could not be found.

    grow: called when blocks of kind 1 lack; returns how many blocks it added to the cache, 0 when it is full.
    """

    def __init__(self, grow: Callable[[], int]):
        self._grow = grow
        self._blocks: list[Block] = []  # by block id
        self._free = FreeQueue()
        self._cached = FreeQueue()
        self._by_digest: dict[bytes, Block] = {}
        self._last_serial = 0
        self.num_references = 0  # the sum of all reference counts
        self.num_evictions = 0
        self.handed_out: list[int] | None = None  # if a list, blocks are noted in it when they are handed out

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def num_free_blocks(self) -> int:
        """Blocks without a reference, the cached ones among them."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached_blocks(self) -> int:
        return len(self._cached)

    def ref_count(self, block_id: int) -> int:
        """0 means free."""
        return self._blocks[block_id].ref_count

    def content(self, block_id: int) -> Content | None:
        return self._blocks[block_id].content

    def unused_blocks(self) -> list[int]:
        """The free blocks that hold nothing of use."""
        return [block.block_id for block in self._free]

    def cached_blocks(self) -> list[int]:
        """The free blocks that can be found, in the order in which they would be evicted."""
        return [block.block_id for block in self._cached]

    def add_blocks(self, count: int) -> None:
        """Take note of `count` more blocks of the cache, all free."""
        for _ in range(count):
            block = Block(len(self._blocks))
            self._blocks.append(block)
            self._free.append(block)

    # -- references ----------------------------------------------------------------------------------------

    def can_allocate(self, count: int) -> bool:
        """Whether there are `count` free blocks; grows the cache if that helps."""
        while self.num_free_blocks < count:
            if not self._add_slab():
                return False
        return True

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each; None, and nothing taken, when there are not so many."""
        while len(self._free) < count and self._add_slab():
            pass
        if self.num_free_blocks < count:
            return None
        block_ids = []
        for _ in range(count):
            if self._free:
                block = self._free.popleft()
            else:
                block = self._cached.popleft()
                self._drop_content(block)
                self.num_evictions += 1
            block.ref_count = 1
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
                self._queue_of(block).append(block)

    def free_all(self) -> None:
        """No block has a reference any more, whatever state the books were left in."""
        self._free, self._cached = FreeQueue(), FreeQueue()
        self._by_digest = {block.content.prefix.digest: block for block in self._blocks if block.content is not None}
        for block in self._blocks:
            block.ref_count = 0
            if block.content is not None and self._by_digest[block.content.prefix.digest] is not block:
                block.content = None
            self._queue_of(block).append(block)
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
            self._free.append(block)
        self._drop_content(block)

    def _drop_content(self, block: Block) -> None:
        del self._by_digest[block.content.prefix.digest]
        block.content = None

    def _queue_of(self, block: Block) -> FreeQueue:
        return self._free if block.content is None else self._cached

    def _add_slab(self) -> bool:
        added = self._grow()
        self.add_blocks(added)
        return added > 0
