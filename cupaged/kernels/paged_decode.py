"""Attention of one query token a sequence over the paged cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from cupaged.backends.base import Rope
from cupaged.kernels.checks import C_TYPE, HALF_TYPES, ceil_div, check, check_that, check_vectors
from cupaged.kernels.compile import NULL, load_kernel
from cupaged.kernels.device import device_info
from cupaged.kernels.paged_attention import MAX_GRID_YZ, check_attention, kernel_window, softmax_scale
from cupaged.kernels.paged_kv import paged_kv
from cupaged.kernels.rope import rope_arguments

TILE_ROWS = 16  # kTileRows in paged_decode.cu
MIN_SPLIT = 256  # keys that a split has at least; kMinSplit in decode_splits.cuh
MAX_SPLITS = 32  # of one sequence
MERGE_WARPS = 4  # a thread block of merge_splits in paged_decode_sm90.cu, each with a head
NO_ROPE = (NULL, NULL, NULL, np.int32(0), np.float32(0))
TARGET_THREAD_BLOCKS = 128  # that one long sequence is spread over, about one for each multiprocessor of a large GPU

# head_dim -> (warps a thread block, tiles in the ring). A tile has 16 keys for each warp; the ring takes 64 to 80 KB,
# which keeps 50 KB and more under way, what one multiprocessor must have in flight to keep its share of the memory
# busy, and lets two thread blocks live on one of a data-centre GPU.
TILES = {64: (4, 8), 80: (4, 8), 96: (4, 6), 128: (4, 5), 256: (2, 5)}


class DecodeKernel(NamedTuple):
    """An instantiation, and how it wants to be launched."""

    file: str
    name: str
    tile_rows: int  # query heads of one kv head that share its keys
    num_threads: int
    shared_bytes: int
    ropes: bool = False  # whether it does what rope_and_store_kv does, if asked to
    # Where thread blocks take all work in turns: how many a multiprocessor holds, and the kernel that merges splits.
    blocks_an_sm: int = 0
    merge_name: str = ""


def decode_kernel(dtype: np.dtype, head_dim: int, group: int) -> DecodeKernel:
    num_warps, num_stages = TILES[head_dim]
    return DecodeKernel(
        "paged_decode.cu",
        f"paged_decode<{C_TYPE[dtype]}, {head_dim}, {num_warps}, {num_stages}>",
        tile_rows=TILE_ROWS,
        num_threads=32 * num_warps,
        shared_bytes=(num_stages * 16 * num_warps + TILE_ROWS) * head_dim * dtype.itemsize,
    )


def instantiations() -> Iterator[tuple[str, str]]:
    """(file, name) of every kernel that this module launches."""
    for dtype in HALF_TYPES:
        for head_dim in TILES:
            yield decode_kernel(dtype, head_dim, 1)[:2]


KERNELS = dict.fromkeys(TILES, decode_kernel)


def max_splits(num_kv_heads: int) -> int:
    """The most parts that a sequence's keys are split into. It depends on the model alone, so that a sequence's
    result doesn't depend on the batch or on how large batches may become."""
    return min(MAX_SPLITS, ceil_div(TARGET_THREAD_BLOCKS, num_kv_heads))


def _num_splits(num_kv_heads: int, max_seq_len: int) -> int:
    """The most parts that a sequence of up to max_seq_len tokens is split into."""
    return max(1, min(max_splits(num_kv_heads), ceil_div(max_seq_len, MIN_SPLIT)))


def _num_blocks(blocks_an_sm: int, num_sms: int) -> int:
    """Thread blocks that take all work in turns: as many as the GPU holds, less what is over the most even number. Long
    sequences have TARGET_THREAD_BLOCKS pieces with most numbers of kv heads."""
    capacity = blocks_an_sm * num_sms
    return capacity - capacity % TARGET_THREAD_BLOCKS or capacity


def decode_workspace_size(
    max_num_seqs: int, num_heads: int, num_kv_heads: int, head_dim: int, max_model_len: int
) -> int:
    """Bytes of `workspace` that `paged_decode` wants for up to max_num_seqs sequences of up to max_model_len tokens.

    A float32 output and a state of 8 bytes for each split of each query head, and a counter for each thread block's
    share of a sequence. 68 MB for 256 sequences of 128k tokens with 32 heads, 8 kv heads and head_dim 128.
    """
    parts = max_num_seqs * num_heads * _num_splits(num_kv_heads, max_model_len)
    return parts * (4 * head_dim + 8) + 4 * max_num_seqs * num_kv_heads * ceil_div(num_heads // num_kv_heads, TILE_ROWS)


def paged_decode(
    out,
    qkv,
    arena,
    layer: int,
    block_tables,
    seq_lens,
    workspace,
    *,
    num_heads: int,
    num_decodes: int,
    max_seq_len: int,
    sm_scale: float,
    window: int = 0,
    rope: Rope | None = None,
    kernels: Mapping[int, Callable[[np.dtype, int, int], DecodeKernel]] = KERNELS,
) -> None:
    """`Backend.paged_attention` for the first num_decodes sequences, token i being the only query of sequence i.

    out [num_tokens, num_heads * head_dim] and qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], bfloat16 or
    float16 like the cache; arena: the cache (`KVArena`), of which `layer` is read; block_tables [num_seqs, max_blocks]
    int32; seq_lens [num_seqs] int32, of which none among the first num_decodes exceeds max_seq_len; where it is 0, the
    row of out becomes zeros. Further tokens and sequences may follow; they are left alone. kernels: which one for which
    head_dim.

    rope: where given, queries and keys in qkv are neither normed nor rotated yet and the newest keys and values not in
    the cache: that is done as by `rope_and_store_kv`, to the bit, but for qkv, which stays as it is. For kernels that
    `ropes` only; all tokens are those of the first num_decodes sequences. What else the cache holds must have been
    there before the launch before this one began, as a rule that of qkv: it is fetched before the wait for that one.

    workspace: uint8, at least `decode_workspace_size` bytes for these sizes, zeros before its first use; what a launch
    leaves in it suits the next. Launches that share one must follow each other on one stream.

    Raises ValueError on arrays, sizes or a head_dim that don't fit.
    """
    layout = arena.layout
    head_dim, num_kv_heads = layout.head_dim, layout.num_kv_heads
    check_attention(out, qkv, arena, layer, block_tables, seq_lens, num_heads, kernels)
    scale, window = softmax_scale(sm_scale), kernel_window(window)
    most = min(qkv.shape[0], seq_lens.shape[0], MAX_GRID_YZ)
    check_that(0 <= num_decodes <= most, f"num_decodes: expected 0 to {most} for these arrays; got {num_decodes}")
    check_that(
        0 <= max_seq_len <= block_tables.shape[1] * layout.block_size,
        f"max_seq_len: block_tables {block_tables.shape} hold {block_tables.shape[1] * layout.block_size} tokens"
        f" a sequence; got {max_seq_len}",
    )
    check("workspace", workspace, (None,), np.uint8)
    wanted = decode_workspace_size(num_decodes, num_heads, num_kv_heads, head_dim, max_seq_len)
    check_that(
        workspace.shape[0] >= wanted and workspace.shape[0] % 16 == 0,
        f"workspace: expected {wanted} bytes or more, in whole 16s; got {workspace.shape[0]}",
    )
    group = num_heads // num_kv_heads
    kernel = kernels[head_dim](qkv.dtype, head_dim, group)
    rope_args = NO_ROPE
    if rope is not None:
        check_that(kernel.ropes, f"rope: {kernel.file} takes queries and keys that are rotated; got some that are not")
        check_that(num_decodes == qkv.shape[0], f"rope: all {qkv.shape[0]} tokens must decode; got {num_decodes}")
        rope_args = rope_arguments(rope, qkv.dtype, head_dim)
        check_vectors("qkv", qkv, head_dim)
    if num_decodes == 0:
        return
    num_splits = _num_splits(num_kv_heads, max_seq_len)
    outs_size = 4 * head_dim * num_decodes * num_heads * num_splits
    partial_outs = workspace[:outs_size].view(np.float32)
    partial_states = workspace[outs_size : outs_size + outs_size // head_dim * 2].view(np.uint64)
    arrays = (out, qkv, block_tables, seq_lens, partial_outs, partial_states)
    sizes = (
        paged_kv(arena, layer),
        np.int32(num_heads),
        np.int32(block_tables.shape[1]),
        np.int32(layout.block_size.bit_length() - 1),
        np.int32(max_splits(num_kv_heads)),
        np.int32(window),
        np.float32(scale),
    )
    launch = load_kernel(kernel.file, kernel.name)
    grid = (num_splits, num_kv_heads * ceil_div(group, kernel.tile_rows), num_decodes)
    if not kernel.merge_name:
        # The counters lie at the end, where no batch's partial results come: they must stay zeros between launches.
        counters = workspace[-4 * num_decodes * grid[1] :].view(np.int32)
        launch(grid, (kernel.num_threads,), (*arrays, counters, *sizes), shared_mem=kernel.shared_bytes)
        return
    args = (*arrays, *sizes, np.int32(num_decodes), np.int32(num_splits), *rope_args)
    grid = (min(math.prod(grid), _num_blocks(kernel.blocks_an_sm, device_info().num_sms)),)
    launch(grid, (kernel.num_threads,), args, shared_mem=kernel.shared_bytes)
    if num_splits > 1:
        args = (
            out,
            seq_lens,
            partial_outs,
            partial_states,
            np.int32(num_heads),
            np.int32(num_splits),
            np.int32(max_splits(num_kv_heads)),
            np.int32(window),
        )
        grid = (num_decodes, ceil_div(num_heads, MERGE_WARPS))
        load_kernel(kernel.file, kernel.merge_name)(grid, (32 * MERGE_WARPS,), args)
