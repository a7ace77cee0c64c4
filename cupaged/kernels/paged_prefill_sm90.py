"""The kernels that paged_prefill takes on Hopper."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupaged.kernels.checks import C_TYPE, HALF_TYPES
from cupaged.kernels.paged_prefill import KERNELS, SPLIT_KEYS, PrefillKernel

NUM_ROWS = 128  # kRows in paged_prefill_sm90.cu
NUM_KEYS = 128  # a tile

NUM_SLOTS = 4  # kSlots
NUM_QUERY_TILES = 2  # kQueryTiles
NUM_THREADS = 384  # a warpgroup that fetches, two that multiply
HEAD_DIMS = (64, 128)  # whole panels of 64 that registers and shared memory hold


def prefill_kernel(dtype: np.dtype, head_dim: int) -> PrefillKernel:
    tiles = (NUM_QUERY_TILES * NUM_ROWS + NUM_SLOTS * NUM_KEYS) * head_dim
    return PrefillKernel(
        "paged_prefill_sm90.cu",
        f"paged_prefill_sm90<{C_TYPE[dtype]}, {head_dim}, {NUM_KEYS}, {SPLIT_KEYS}>",
        NUM_ROWS,
        NUM_THREADS,
        # From a multiple of 1,024 on: the tiles, 64 columns of results, two barriers a tile.
        shared_bytes=1024 + (tiles + NUM_ROWS * 64) * dtype.itemsize + (NUM_SLOTS + NUM_QUERY_TILES) * 2 * 8,
        is_persistent=True,
        image_bytes=4 * NUM_ROWS * (head_dim + 8),
    )


KERNELS_SM90 = {**KERNELS, **dict.fromkeys(HEAD_DIMS, prefill_kernel)}


def instantiations() -> Iterator[tuple[str, str]]:
    """(file, name) of every kernel that is here."""
    for dtype in HALF_TYPES:
        for head_dim in HEAD_DIMS:
            yield prefill_kernel(dtype, head_dim)[:2]
