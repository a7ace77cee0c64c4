"""The KV cache as kernels have it: the struct that hands them a layer, and the order of a block. Twins are in
cuda_src/paged_kv.cuh."""

from __future__ import annotations

import functools

import numpy as np

from cupaged.memory.arena import KVArena, KVLayout

CHUNK_SIZE = 8  # elements that stay together: 16 bytes

PAGED_KV = np.dtype(
    [
        ("slabs", np.uint64),
        ("k_offset", np.int64),
        ("v_offset", np.int64),
        ("slab_shift", np.int32),
        ("num_kv_heads", np.int32),
    ]
)


def paged_kv(arena: KVArena, layer: int) -> np.ndarray:
    """A 0-d array of PAGED_KV, which the loader passes by value. The same one for each call with the same."""
    return _paged_kv(arena.slab_table_address, arena.layout, layer)


@functools.lru_cache(maxsize=4096)
def _paged_kv(slab_table_address: int, layout: KVLayout, layer: int) -> np.ndarray:
    values = (
        slab_table_address,
        layout.offset(layer, 0),
        layout.offset(layer, 1),
        layout.slab_shift,
        layout.num_kv_heads,
    )
    struct = np.array(values, dtype=PAGED_KV)
    struct.flags.writeable = False
    return struct


def chunk_places(block_size: int, head_dim: int) -> np.ndarray:
    """[block_size, head_dim / 8]: where the kernels put the chunks of 8 elements of what a block holds of one head.

    `block.reshape(..., -1, 8)[..., places, :]` are the plain rows of a block [..., block_size, head_dim], in a NumPy or
    CuPy array or a torch tensor. The NumPy backend's blocks are plain rows as they are.
    """
    row, chunk = np.ogrid[:block_size, : head_dim // CHUNK_SIZE]
    if head_dim % 64:
        return row * (head_dim // CHUNK_SIZE) + chunk
    return (chunk // 8 * block_size + row) * 8 + (chunk % 8 ^ row % 8)
