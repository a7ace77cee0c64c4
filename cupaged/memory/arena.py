"""The KV cache's memory: slabs of blocks, taken when sequences need them, and given back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupaged.errors import OutOfMemoryError

TARGET_SLAB_BYTES = 128 << 20
# The cache is made of at least this many slabs if it can be, as only whole ones fit under its limit.
MIN_SLABS = 8
# A failed growth is not tried again sooner: asking for memory that isn't there is slow, and a full cache asks often.
GROW_RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class KVLayout:
    """The shape of the cache. A slab is one array
    [num_layers, 2 (K, V), blocks_per_slab, num_kv_heads, block_size, head_dim]:
    the block_size tokens of one head in one block are one contiguous run. In what order the CUDA kernels keep it is
    their own business (`chunk_places` in kernels/paged_kv.py).
    """

    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: np.dtype
    blocks_per_slab: int  # a power of two, so that a block id splits into slab and index by a shift

    @classmethod
    def choose(cls, *, num_layers, num_kv_heads, block_size, head_dim, dtype, max_blocks: int) -> KVLayout:
        """The layout with the largest slabs of at most TARGET_SLAB_BYTES and a MIN_SLABS-th of `max_blocks` (but of
        one block at least)."""
        layout = cls(num_layers, num_kv_heads, block_size, head_dim, np.dtype(dtype), 1)
        blocks = max(1, min(TARGET_SLAB_BYTES // layout.bytes_per_block, max_blocks // MIN_SLABS))
        return cls(num_layers, num_kv_heads, block_size, head_dim, np.dtype(dtype), 1 << (blocks.bit_length() - 1))

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def bytes_per_block(self) -> int:
        return self.bytes_per_token * self.block_size

    @property
    def bytes_per_slab(self) -> int:
        return self.bytes_per_block * self.blocks_per_slab

    @property
    def slab_shape(self) -> tuple[int, ...]:
        return (self.num_layers, 2, self.blocks_per_slab, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def slab_shift(self) -> int:
        """log2(blocks_per_slab): block id >> slab_shift is the slab."""
        return self.blocks_per_slab.bit_length() - 1

    def offset(self, layer: int, part: int) -> int:
        """Elements from a slab's start to `layer`'s K (part 0) or V (part 1)."""
        return (layer * 2 + part) * self.blocks_per_slab * self.num_kv_heads * self.block_size * self.head_dim


class KVArena:
    """Slabs of KV blocks and the device table of their addresses.

    Block id b lies in slab b >> layout.slab_shift. Kernels find a slab's address in `slab_table`, whose own
    address never changes, so a captured graph outlives growth.

    backend: gives the memory (`Backend.empty`, CuPy's current allocator on a GPU) and the copies.
    max_blocks: the most blocks the cache may reach; growth stops at whole slabs below it.
    allocate: where slabs come from instead; `Backend.empty_host` makes this a swap space.
    """

    def __init__(
        self,
        layout: KVLayout,
        backend,
        max_blocks: int,
        allocate: Callable[[tuple[int, ...], np.dtype], Any] | None = None,
    ):
        self.layout = layout
        self.max_slabs = max(1, max_blocks // layout.blocks_per_slab)
        self.slabs: list = []  # None where one was given back
        self._vacant: list[int] = []  # those places
        self.slab_table = backend.empty((self.max_slabs,), np.int64)
        self.slab_table_address = backend.address(self.slab_table)
        self._backend = backend
        self._allocate = allocate or backend.empty
        self._retry_time = 0.0  # on time.monotonic()'s clock

    @property
    def max_blocks(self) -> int:
        return self.max_slabs * self.layout.blocks_per_slab

    @property
    def num_slabs(self) -> int:
        return len(self.slabs) - len(self._vacant)

    @property
    def num_blocks(self) -> int:
        return self.num_slabs * self.layout.blocks_per_slab

    @property
    def num_bytes(self) -> int:
        """Of its slabs."""
        return self.num_slabs * self.layout.bytes_per_slab

    def grow(self) -> int:
        """Take one more slab, in the first place that has none; returns how many blocks that adds, 0 when the limit is
        reached or no memory is left."""
        if self.num_slabs == self.max_slabs or time.monotonic() < self._retry_time:
            return 0
        try:
            slab = self._allocate(self.layout.slab_shape, self.layout.dtype)
        except OutOfMemoryError:
            self._retry_time = time.monotonic() + GROW_RETRY_SECONDS
            return 0
        index = min(self._vacant, default=len(self.slabs))
        self._set_address(index, self._backend.address(slab))
        if self._vacant:
            self._vacant.remove(index)
        self.slabs[index : index + 1] = [slab]  # last, so that no interrupt leaves a slab that is not in the table
        return self.layout.blocks_per_slab

    def release(self, index: int) -> None:
        """Give one slab back, to where it came from. Nothing may use its blocks any more."""
        self.slabs[index] = None
        self._vacant.append(index)
        self._set_address(index, 0)

    def poison(self, block_ids: Sequence[int]) -> None:
        """Fill these blocks with NaN, so that who reads them before they are written can't miss it. Slow."""
        shift, mask = self.layout.slab_shift, self.layout.blocks_per_slab - 1
        for block_id in block_ids:
            self.slabs[block_id >> shift][:, :, block_id & mask] = np.nan

    def _set_address(self, index: int, address: int) -> None:
        self._backend.copy_in(self.slab_table[index : index + 1], np.array([address], np.int64))

    def close(self) -> None:
        """Give the memory back."""
        self.slabs.clear()
        self._vacant.clear()
        self.slab_table = None
