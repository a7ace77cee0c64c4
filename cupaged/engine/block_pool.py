"""The host-side truth about the KV cache's blocks: which are free, and how often the others are referenced."""

from __future__ import annotations

from collections.abc import Callable, Iterable


class Block:
    """One block's reference count and, while it is free, its neighbours in the free queue."""

    __slots__ = ("block_id", "next", "prev", "ref_count")

    def __init__(self, block_id: int):
        self.block_id = block_id
        self.ref_count = 0
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

    grow: called when too few blocks are free; returns how many blocks it added to the cache, 0 when it is full.
    """

    def __init__(self, grow: Callable[[], int]):
        self._grow = grow
        self._blocks: list[Block] = []  # by block id
        self._free = FreeQueue()

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def ref_count(self, block_id: int) -> int:
        """0 means free."""
        return self._blocks[block_id].ref_count

    def add_blocks(self, count: int) -> None:
        """Take note of `count` more blocks of the cache, all free."""
        for _ in range(count):
            block = Block(len(self._blocks))
            self._blocks.append(block)
            self._free.append(block)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each; None, and nothing taken, when there are not so many."""
        while len(self._free) < count:
            added = self._grow()
            if not added:
                return None
            self.add_blocks(added)
        block_ids = []
        for _ in range(count):
            block = self._free.popleft()
            block.ref_count = 1
            block_ids.append(block.block_id)
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """One more reference to each of these blocks, which are in use already."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.ref_count == 0:
                raise RuntimeError(f"block {block_id} is shared, but it is free")
            block.ref_count += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """One reference less; the blocks without any left go to the end of the free queue, in this order."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.ref_count == 0:
                raise RuntimeError(f"block {block_id} is freed twice")
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free.append(block)
