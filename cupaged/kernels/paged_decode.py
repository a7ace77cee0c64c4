"""Attention of one query token a sequence over the paged cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupaged.kernels.checks import C_TYPE, HALF_TYPES, ceil_div, check, check_that
from cupaged.kernels.compile import load_kernel
from cupaged.kernels.paged_attention import MAX_GRID_YZ, check_attention, kernel_window, softmax_scale
from cupaged.kernels.paged_kv import paged_kv

TILE_ROWS = 16  # query heads of one kv head that one thread block serves; kTileRows in paged_decode.cu
MIN_SPLIT = 256  # keys that a split has at least; kMinSplit in paged_decode.cu
MAX_SPLITS = 32  # of one sequence
TARGET_THREAD_BLOCKS = 128  # that one long sequence is spread over, about one for each multiprocessor of a large GPU

# head_dim -> (warps a thread block, tiles in the ring). A tile has 16 keys for each warp; the ring takes 64 to 80 KB,
# which keeps 50 KB and more under way, what one multiprocessor must have in flight to keep its share of the memory
# busy, and lets two thread blocks live on one of a data-centre GPU.
TILES = {64: (4, 8), 80: (4, 8), 96: (4, 6), 128: (4, 5), 256: (2, 5)}


def kernel_name(dtype: np.dtype, head_dim: int) -> tuple[str, str]:
    num_warps, num_stages = TILES[head_dim]
    return "paged_decode.cu", f"paged_decode<{C_TYPE[dtype]}, {head_dim}, {num_warps}, {num_stages}>"


def instantiations() -> Iterator[tuple[str, str]]:
    """(file, name) of every kernel that this module launches."""
    for dtype in HALF_TYPES:
        for head_dim in TILES:
            yield kernel_name(dtype, head_dim)


def max_splits(num_kv_heads: int) -> int:
    """The most parts that a sequence's keys are split into. It depends on the model alone, so that a sequence's
    result doesn't depend on the batch or on how large batches may become."""
    return min(MAX_SPLITS, ceil_div(TARGET_THREAD_BLOCKS, num_kv_heads))


def _num_splits(num_kv_heads: int, max_seq_len: int) -> int:
    """The most parts that a sequence of up to max_seq_len tokens is split into."""
    return max(1, min(max_splits(num_kv_heads), ceil_div(max_seq_len, MIN_SPLIT)))


def _num_tiles(num_heads: int, num_kv_heads: int) -> int:
    """Thread blocks that share out the query heads."""
    return num_kv_heads * ceil_div(num_heads // num_kv_heads, TILE_ROWS)


def decode_workspace_size(
    max_num_seqs: int, num_heads: int, num_kv_heads: int, head_dim: int, max_model_len: int
) -> int:
    """Bytes of `workspace` that `paged_decode` wants for up to max_num_seqs sequences of up to max_model_len tokens.

    A float32 output and a state of 8 bytes for each split of each query head, and a counter for each thread block's
    share of a sequence. 68 MB for 256 sequences of 128k tokens with 32 heads, 8 kv heads and head_dim 128.
    """
    parts = max_num_seqs * num_heads * _num_splits(num_kv_heads, max_model_len)
    return parts * (4 * head_dim + 8) + 4 * max_num_seqs * _num_tiles(num_heads, num_kv_heads)


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
) -> None:
    """`Backend.paged_attention` for the first num_decodes sequences, token i being the only query of sequence i.

    out [num_tokens, num_heads * head_dim] and qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], bfloat16 or
    float16 like the cache; arena: the cache (`KVArena`), of which `layer` is read; block_tables [num_seqs, max_blocks]
    int32; seq_lens [num_seqs] int32, of which none among the first num_decodes exceeds max_seq_len; where it is 0, the
    row of out becomes zeros. Further tokens and sequences may follow; they are left alone.

    workspace: uint8, at least `decode_workspace_size` bytes for these sizes, zeros before its first use; what a launch
    leaves in it suits the next. Launches that share one must follow each other on one stream.

    Raises ValueError on arrays, sizes or a head_dim that don't fit.
    """
    layout = arena.layout
    head_dim, num_kv_heads = layout.head_dim, layout.num_kv_heads
    check_attention(out, qkv, arena, layer, block_tables, seq_lens, num_heads, TILES)
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
    if num_decodes == 0:
        return
    num_splits = _num_splits(num_kv_heads, max_seq_len)
    num_tiles = _num_tiles(num_heads, num_kv_heads)
    outs_size = 4 * head_dim * num_decodes * num_heads * num_splits
    # The counters lie at the end, where no batch's partial results come: they must stay zeros between launches.
    counters_start = workspace.shape[0] - 4 * num_decodes * num_tiles
    num_warps, num_stages = TILES[head_dim]
    args = (
        out,
        qkv,
        block_tables,
        seq_lens,
        workspace[:outs_size].view(np.float32),
        workspace[outs_size : outs_size + outs_size // head_dim * 2].view(np.uint64),
        workspace[counters_start:].view(np.int32),
        paged_kv(arena, layer),
        np.int32(num_heads),
        np.int32(block_tables.shape[1]),
        np.int32(layout.block_size.bit_length() - 1),
        np.int32(max_splits(num_kv_heads)),
        np.int32(window),
        np.float32(scale),
    )
    grid = (num_splits, num_tiles, num_decodes)
    shared_mem = (num_stages * 16 * num_warps + TILE_ROWS) * head_dim * qkv.dtype.itemsize
    load_kernel(*kernel_name(qkv.dtype, head_dim))(grid, (32 * num_warps,), args, shared_mem=shared_mem)
