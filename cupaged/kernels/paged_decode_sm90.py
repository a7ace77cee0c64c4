"""The kernels that paged_decode takes on Hopper."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupaged.kernels.checks import C_TYPE, HALF_TYPES
from cupaged.kernels.paged_decode import KERNELS, MERGE_WARPS, DecodeKernel

NUM_WARPS = 4
NUM_SLOTS = 3  # of each warp's ring

# head_dim -> tiles of 16 keys that a warp takes at a step. Two thread blocks' rings, 192 KB, fit a multiprocessor.
KEY_TILES = {64: 4, 128: 2}


def decode_kernel(dtype: np.dtype, head_dim: int, group: int) -> DecodeKernel:
    head_tiles = 1 if group <= 8 else 2
    num_tiles = KEY_TILES[head_dim]
    ring = NUM_WARPS * NUM_SLOTS * num_tiles * 16 * head_dim * dtype.itemsize
    merging = NUM_WARPS * (NUM_WARPS * (4 * head_dim + 8) + 16)  # for each warp a head of each warp, with its state
    # HeadRotation's: a position's cosines and sines; two norms' weights, the newest key and value; the queries.
    rotation = 4 * head_dim + (4 * head_dim + 8 * head_tiles * (head_dim + 8)) * dtype.itemsize
    return DecodeKernel(
        "paged_decode_sm90.cu",
        f"paged_decode_sm90<{C_TYPE[dtype]}, {head_dim}, {head_tiles}, {num_tiles}, {NUM_WARPS}, {NUM_SLOTS}>",
        tile_rows=8 * head_tiles,
        num_threads=32 * NUM_WARPS,
        shared_bytes=ring + merging + rotation + NUM_WARPS * NUM_SLOTS * 8,  # the last: a barrier a slot
        ropes=True,
        blocks_an_sm=2,
        merge_name=f"merge_splits<{C_TYPE[dtype]}, {head_dim}, {MERGE_WARPS}>",
    )


KERNELS_SM90 = {**KERNELS, **dict.fromkeys(KEY_TILES, decode_kernel)}


def instantiations() -> Iterator[tuple[str, str]]:
    """(file, name) of every kernel that is here."""
    for dtype in HALF_TYPES:
        for head_dim in KEY_TILES:
            for group in (1, 16):
                kernel = decode_kernel(dtype, head_dim, group)
                yield kernel.file, kernel.name
            yield kernel.file, kernel.merge_name
