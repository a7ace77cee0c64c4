"""What the launchers of paged_decode and paged_prefill check alike."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from cupaged.config import BLOCK_SIZES
from cupaged.kernels.checks import HALF_TYPES, check, check_dtype, check_that

MAX_GRID_YZ = 65535
NO_WINDOW = 1 << 30  # to the kernels, a window that no sequence fills


def check_attention(
    out, qkv, arena, layer: int, block_tables, seq_lens, num_heads: int, head_dims: Collection[int]
) -> None:
    """Raise ValueError, naming the argument, unless the arrays that both kernels take fit each other and the cache."""
    layout = arena.layout
    check_that(
        layout.head_dim in head_dims,
        f"head_dim: expected {' or '.join(map(str, head_dims))}; the cache has {layout.head_dim}",
    )
    check_that(
        layout.block_size in BLOCK_SIZES,
        f"block_size: expected {' or '.join(map(str, BLOCK_SIZES))}; the cache has {layout.block_size}",
    )
    check_that(
        num_heads > 0 and num_heads % layout.num_kv_heads == 0,
        f"num_heads: expected a multiple of the cache's {layout.num_kv_heads} kv heads; got {num_heads}",
    )
    check_that(0 <= layer < layout.num_layers, f"layer: the cache has {layout.num_layers}; got {layer}")
    check_dtype("qkv", qkv, HALF_TYPES)
    check_that(qkv.dtype == layout.dtype, f"qkv: the cache has dtype {layout.dtype}; got {qkv.dtype}")
    num_tokens = qkv.shape[0]
    check("qkv", qkv, (num_tokens, (num_heads + 2 * layout.num_kv_heads) * layout.head_dim), qkv.dtype)
    check("out", out, (num_tokens, num_heads * layout.head_dim), qkv.dtype)
    check("seq_lens", seq_lens, (None,), np.int32)
    check("block_tables", block_tables, (seq_lens.shape[0], None), np.int32)


def softmax_scale(sm_scale: float) -> float:
    """sm_scale for scores in base 2."""
    check_that(0 < sm_scale < math.inf, f"sm_scale: expected a positive number; got {sm_scale}")
    return sm_scale * math.log2(math.e)


def kernel_window(window: int) -> int:
    """The window as the kernels want it; 0 means none."""
    check_that(window >= 0, f"window: expected 0 (none) or more tokens; got {window}")
    return min(window, NO_WINDOW) or NO_WINDOW
