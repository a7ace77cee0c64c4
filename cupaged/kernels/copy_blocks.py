"""Copies of whole KV cache blocks, on the device or to and from pinned host memory; see cuda_src/copy_blocks.cu."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from cupaged.kernels.checks import VECTOR_BYTES, ceil_div, check, check_that
from cupaged.kernels.compile import load_kernel
from cupaged.memory.arena import KVArena

NUM_THREADS = 128
NUM_VECTORS = 8  # of 16 bytes a thread: a thread block takes 16 KB, half of what Llama-3.1-8B has in a block and layer
MAX_PAIRS = 480  # that a launch takes: the twin of BlockPairs in copy_blocks.cu
PAIRS = np.dtype([("ids", np.int32, (MAX_PAIRS, 2))])
KERNEL = ("copy_blocks.cu", f"copy_blocks<{NUM_THREADS}, {NUM_VECTORS}, {MAX_PAIRS}>")


def copy_blocks(dst: KVArena, src: KVArena, pairs: np.ndarray) -> None:
    """Copy blocks, all layers, K and V: pairs [n, 2] int32, a NumPy array, are ids of a block of `src` and of its copy
    in `dst`.

    The arenas' layouts agree, except that slabs may hold different numbers of blocks. dst may be src. Destinations must
    be distinct, in the arena and, when dst is src, no sources: that isn't checked. Raises ValueError for everything
    else that doesn't fit.
    """
    check("pairs", pairs, (None, 2), np.int32)
    layout = src.layout
    check_that(
        dst.layout is layout or replace(dst.layout, blocks_per_slab=1) == replace(layout, blocks_per_slab=1),
        f"dst: its blocks must be laid out as src's; got {dst.layout} for {layout}",
    )
    run_bytes = layout.bytes_per_block // (2 * layout.num_layers)
    check_that(
        run_bytes % VECTOR_BYTES == 0,
        f"src: a layer's keys of a block must be a multiple of {VECTOR_BYTES} bytes; got {run_bytes}",
    )
    run_vectors = run_bytes // VECTOR_BYTES
    sizes = (np.int32(dst.layout.slab_shift), np.int32(layout.slab_shift), np.int32(run_vectors))
    for start in range(0, len(pairs), MAX_PAIRS):
        part = pairs[start : start + MAX_PAIRS]
        struct = np.zeros((), PAIRS)
        struct["ids"][: len(part)] = part
        grid = (len(part), 2 * layout.num_layers, ceil_div(run_vectors, NUM_THREADS * NUM_VECTORS))
        load_kernel(*KERNEL)(grid, (NUM_THREADS,), (dst.slab_table, src.slab_table, struct, *sizes))


def instantiations() -> Iterator[tuple[str, str]]:
    yield KERNEL
