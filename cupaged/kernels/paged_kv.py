"""The struct that hands one layer of the KV cache to a kernel; its twin is in cuda_src/paged_kv.cuh."""

from __future__ import annotations

import numpy as np

from cupaged.memory.arena import KVArena

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
    """A 0-d array of PAGED_KV, which the loader passes by value."""
    layout = arena.layout
    return np.array(
        (
            arena.slab_table_address,
            layout.offset(layer, 0),
            layout.offset(layer, 1),
            layout.slab_shift,
            layout.num_kv_heads,
        ),
        dtype=PAGED_KV,
    )
