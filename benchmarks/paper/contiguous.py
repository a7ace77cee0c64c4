"""What PagedAttention is compared with: a KV cache whose requests each get one contiguous region, for as long as they
run. These policies serve this benchmark; the engine knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable

from cupaged.engine.sequence import Sequence

from .traces import MAX_LEN

# What a request reserves for its output, given its true length and its prompt's.
RESERVATIONS: dict[str, Callable[[int, int], int]] = {
    "Max": lambda num_output, num_prompt: MAX_LEN - num_prompt,
    "Pow2": lambda num_output, num_prompt: min(next_power_of_two(num_output), MAX_LEN - num_prompt),
    "Oracle": lambda num_output, num_prompt: num_output,
}


def next_power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


class BuddyAllocator:
    """Regions of power-of-two sizes out of `num_slots` slots, each aligned to its own size."""

    def __init__(self, num_slots: int):
        self.num_slots = num_slots
        self._free: dict[int, set[int]] = {1 << order: set() for order in range(num_slots.bit_length())}  # by size
        start = 0
        for size in reversed(self._free):  # the largest pieces that num_slots consists of
            if num_slots & size:
                self._free[size].add(start)
                start += size

    def allocate(self, size: int) -> tuple[int, int] | None:
        """(start, size) of a region of at least `size` slots, from the smallest free one that will do; None if there
        is none."""
        size = next_power_of_two(size)
        found = next((s for s in self._free if s >= size and self._free[s]), None)
        if found is None:
            return None
        start = min(self._free[found])
        self._free[found].remove(start)
        while found > size:
            found //= 2
            self._free[found].add(start + found)
        return start, size

    def free(self, start: int, size: int) -> None:
        """Give a region back; it merges with its buddy if that is free."""
        while 2 * size in self._free and (start ^ size) in self._free[size]:
            self._free[size].remove(start ^ size)
            start &= ~size
            size *= 2
        self._free[size].add(start)


class ContiguousBlocks:
    """Stands in for BlockManager under the same Scheduler: requests with one output, each in a region that `reserve`
    sizes and that it keeps to its end. What a request was given always suffices, so none is ever preempted."""

    window = None  # attention is over all tokens
    block_size = 1  # of no meaning: tables stay empty

    def __init__(self, num_slots: int, reserve: Callable[[int, int], int]):
        self.num_slots = num_slots
        self._allocator = BuddyAllocator(num_slots)
        self._reserve = reserve
        self._regions: dict[Sequence, tuple[int, int]] = {}  # (start, size)

    def num_reserved(self, seq: Sequence) -> int:
        """Slots that `seq` asks for, before rounding."""
        num_prompt, max_len = seq.request.num_prompt_tokens, seq.request.max_len
        return num_prompt + self._reserve(max_len - num_prompt, num_prompt)

    def begin_step(self) -> None:
        pass

    def find_prefix(self, seq: Sequence, num_tokens: int) -> list:
        return []

    def is_being_computed(self, seq: Sequence, num_found: int, num_tokens: int) -> bool:
        return False

    def admit(self, seq: Sequence, found: list, num_tokens: int, spare: int, limit: int) -> bool:
        region = self._allocator.allocate(self.num_reserved(seq))
        if region is None:
            return False
        self._regions[seq] = region
        return True

    def allocate_slots(self, seq: Sequence, num_tokens: int) -> bool:
        return True

    def expect(self, seq: Sequence, num_tokens: int) -> None:
        pass

    def take_copies(self) -> list:
        return []

    def advance(self, seq: Sequence, num_tokens: int) -> None:
        seq.num_cached_tokens += num_tokens

    def free(self, seq: Sequence) -> None:
        seq.num_cached_tokens = 0
        self._allocator.free(*self._regions.pop(seq))
