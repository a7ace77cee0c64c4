"""Causal attention of many query tokens a sequence over the paged cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from cupaged.kernels.checks import C_TYPE, HALF_TYPES, ceil_div, check, check_that
from cupaged.kernels.compile import NULL, load_kernel
from cupaged.kernels.device import device_info
from cupaged.kernels.divisor import divisor
from cupaged.kernels.paged_attention import MAX_GRID_YZ, check_attention, kernel_window, softmax_scale
from cupaged.kernels.paged_kv import paged_kv

NUM_WARPS = 4
NUM_STAGES = 2  # kStages in paged_prefill.cu
SPLIT_KEYS = 4096  # kSplitKeys in paged_prefill.cu
# Splits of tiles of rows that a launch has room for, and so keeps a large GPU busy with: at least so many, and all of
# NUM_SPLIT_TILES tiles. Small steps are padded (step_graphs.py), perhaps to twice as many tiles of twice the length.
NUM_PARTS = 1024
NUM_SPLIT_TILES = 8  # of each kv head

# head_dim -> (16-row query tiles a warp, keys a tile): what 255 registers a thread and 99 KB of shared memory hold.
TILES = {64: (2, 64), 80: (2, 64), 96: (2, 64), 128: (2, 64), 256: (1, 64)}


class PrefillKernel(NamedTuple):
    """An instantiation, and how it wants to be launched."""

    file: str
    name: str
    num_rows: int  # of a thread block: (token, head of the group) pairs
    num_threads: int
    shared_bytes: int
    is_persistent: bool = False  # one thread block an SM; these deal out the tiles of rows among them
    split_keys: int = SPLIT_KEYS  # of a split
    image_bytes: int = 0  # of what a persistent one puts by of a tile of rows


def prefill_kernel(dtype: np.dtype, head_dim: int) -> PrefillKernel:
    row_tiles, num_keys = TILES[head_dim]
    num_rows = NUM_WARPS * row_tiles * 16
    return PrefillKernel(
        "paged_prefill.cu",
        f"paged_prefill<{C_TYPE[dtype]}, {head_dim}, {NUM_WARPS}, {row_tiles}, {num_keys}>",
        num_rows,
        num_threads=32 * NUM_WARPS,
        shared_bytes=(NUM_STAGES * num_keys + num_rows) * head_dim * dtype.itemsize,
    )


def instantiations() -> Iterator[tuple[str, str]]:
    """(file, name) of every kernel that this module launches."""
    for dtype in HALF_TYPES:
        for head_dim in TILES:
            yield prefill_kernel(dtype, head_dim)[:2]


KERNELS = dict.fromkeys(TILES, prefill_kernel)
MAX_ITEMS = 1 << 30  # tiles of rows that a persistent kernel can count; each sequence counts as if it were the longest
FIRST_SEQ = 9  # the place of first_seq among the kernels' arguments


def prefill_workspace_size(dtype: np.dtype, head_dim: int, num_kv_heads: int, max_model_len: int) -> int:
    """Bytes of `workspace` that `paged_prefill` wants for sequences of up to max_model_len tokens: a float32 output and
    a state of 8 bytes for each row of each part, and counters."""
    num_splits = ceil_div(max_model_len, SPLIT_KEYS)
    if num_splits <= 1:
        return 0
    return max(NUM_PARTS, NUM_SPLIT_TILES * num_kv_heads * num_splits) * _part_bytes(
        prefill_kernel(dtype, head_dim), head_dim
    )


def _part_bytes(kernel: PrefillKernel, head_dim: int) -> int:
    return kernel.num_rows * (4 * head_dim + 8) + 16  # the last for a counter


def _shares(workspace, num_items: int, num_blocks: int, max_seq_len: int, kernel: PrefillKernel) -> tuple:
    """For a persistent kernel: into how many splits it is to share out each tile of rows (1: it is not, as there are
    enough tiles for all thread blocks, or no room), and scratch for images of tiles, and counters."""
    num_splits = ceil_div(max_seq_len, kernel.split_keys)
    if num_splits <= 1:
        return 1, NULL, NULL
    counter_bytes = 4 * kernel.num_threads // 32  # of a tile: one for each warp that has rows
    room = workspace.shape[0] // (kernel.image_bytes + counter_bytes)
    check_that(room >= num_blocks, f"workspace: {workspace.shape[0]} bytes are too few for {num_blocks} thread blocks")
    if num_items >= num_blocks or num_items * num_splits > room:
        num_splits = 1
    # The counters lie at the end, where no images come: they must stay zeros between launches.
    images, counters = workspace[: room * kernel.image_bytes], workspace[workspace.shape[0] - room * counter_bytes :]
    return num_splits, images.view(np.float32), counters.view(np.int32)


def _scratch(workspace, num_parts: int, num_splits: int, kernel: PrefillKernel, head_dim: int) -> tuple:
    """Partial outputs, their states, counters; nulls when there is one split."""
    if num_splits == 1:
        return NULL, NULL, NULL
    outs_size, states_size = num_parts * kernel.num_rows * head_dim * 4, num_parts * kernel.num_rows * 8
    # The counters lie at the end, where no batch's partial results come: they must stay zeros between launches.
    counters_start = workspace.shape[0] - 4 * (num_parts // num_splits)
    return (
        workspace[:outs_size].view(np.float32),
        workspace[outs_size : outs_size + states_size].view(np.uint64),
        workspace[counters_start:].view(np.int32),
    )


def paged_prefill(
    out,
    qkv,
    arena,
    layer: int,
    block_tables,
    seq_lens,
    query_start_loc,
    workspace,
    *,
    num_heads: int,
    num_decodes: int,
    max_query_len: int,
    max_seq_len: int,
    sm_scale: float,
    window: int = 0,
    kernels: Mapping[int, Callable[[np.dtype, int], PrefillKernel]] = KERNELS,
    num_blocks: int | None = None,
) -> None:
    """`Backend.paged_attention` for the sequences after the first num_decodes.

    out [num_tokens, num_heads * head_dim] and qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], bfloat16 or
    float16 like the cache; arena: the cache (`KVArena`), of which `layer` is read; block_tables [num_seqs, max_blocks]
    int32; seq_lens [num_seqs] and query_start_loc [num_seqs + 1] int32 as in `Batch`, no query after the decodes longer
    than max_query_len, no sequence than max_seq_len. Rows of out that belong to the decodes are left alone. kernels:
    which one for which head_dim.
    num_blocks: thread blocks of a persistent kernel at most, by default one an SM; results don't depend on it.

    workspace: uint8, at least `prefill_workspace_size` bytes for these sizes, zeros before its first use; what a launch
    leaves in it suits the next. Launches that share one must follow each other on one stream.

    Raises ValueError on arrays, sizes or a head_dim that don't fit.
    """
    layout = arena.layout
    check_attention(out, qkv, arena, layer, block_tables, seq_lens, num_heads, kernels)
    scale, window = softmax_scale(sm_scale), kernel_window(window)
    num_seqs = seq_lens.shape[0]
    check("query_start_loc", query_start_loc, (num_seqs + 1,), np.int32)
    check_that(0 <= num_decodes <= num_seqs, f"num_decodes: expected 0 to {num_seqs}; got {num_decodes}")
    check_that(
        num_seqs - num_decodes <= MAX_GRID_YZ,
        f"seq_lens: at most {MAX_GRID_YZ} sequences in one launch; got {num_seqs - num_decodes}",
    )
    kernel = kernels[layout.head_dim](qkv.dtype, layout.head_dim)
    num_tiles = ceil_div(max_query_len * (num_heads // layout.num_kv_heads), kernel.num_rows)
    most = MAX_GRID_YZ * kernel.num_rows * layout.num_kv_heads // num_heads
    check_that(0 <= max_query_len <= most, f"max_query_len: expected 0 to {most}; got {max_query_len}")
    check("workspace", workspace, (None,), np.uint8)
    if num_seqs == num_decodes or num_tiles == 0:
        return
    args = [
        out,
        qkv,
        block_tables,
        seq_lens,
        query_start_loc,
        paged_kv(arena, layer),
        divisor(num_heads // layout.num_kv_heads),
        np.int32(block_tables.shape[1]),
        np.int32(layout.block_size.bit_length() - 1),
        np.int32(num_decodes),
        np.int32(window),
        np.float32(scale),
    ]
    launch, threads = load_kernel(kernel.file, kernel.name), (kernel.num_threads,)
    if kernel.is_persistent:
        num_items = layout.num_kv_heads * (num_seqs - num_decodes) * num_tiles
        check_that(
            num_items < MAX_ITEMS,
            f"max_query_len: {num_seqs - num_decodes} sequences of {max_query_len} tokens are too many for one launch",
        )
        num_blocks = num_blocks or device_info().num_sms
        num_splits, images, counters = _shares(workspace, num_items, num_blocks, max_seq_len, kernel)
        grid = (min(num_items * num_splits, num_blocks),)
        args += [divisor(layout.num_kv_heads), divisor(num_seqs - num_decodes), np.int32(num_tiles)]
        args += [divisor(num_splits), images, counters]
        launch(grid, threads, tuple(args), shared_mem=kernel.shared_bytes)
        return
    num_splits = max(1, ceil_div(max_seq_len, SPLIT_KEYS))
    seqs_a_launch, tiles_a_launch = num_seqs - num_decodes, num_tiles
    if num_splits > 1:  # as much as the workspace has room for
        room = workspace.shape[0] // _part_bytes(kernel, layout.head_dim) // (layout.num_kv_heads * num_splits)
        check_that(room > 0, f"workspace: {workspace.shape[0]} bytes are too few for sequences of {max_seq_len} tokens")
        seqs_a_launch = min(seqs_a_launch, room)
        tiles_a_launch = min(tiles_a_launch, room // seqs_a_launch)
    for first_seq in range(num_decodes, num_seqs, seqs_a_launch):
        for last_tile in range(num_tiles - 1, -1, -tiles_a_launch):
            args[FIRST_SEQ] = np.int32(first_seq)
            x, y = layout.num_kv_heads * num_splits, min(seqs_a_launch, num_seqs - first_seq)
            grid = (x, y, min(tiles_a_launch, last_tile + 1))
            scratch = _scratch(workspace, math.prod(grid), num_splits, kernel, layout.head_dim)
            values = (*args, *scratch, np.int32(num_splits), np.int32(last_tile))
            launch(grid, threads, values, shared_mem=kernel.shared_bytes)
