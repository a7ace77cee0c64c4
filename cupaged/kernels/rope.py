"""Rotary embedding fused with the write of keys and values to the cache; the kernel is cuda_src/rope.cu."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupaged.backends.base import Rope
from cupaged.config import BLOCK_SIZES
from cupaged.kernels.checks import (
    C_TYPE,
    HALF_TYPES,
    HEAD_DIMS,
    ceil_div,
    check,
    check_dtype,
    check_that,
    check_vectors,
)
from cupaged.kernels.compile import NULL, load_kernel
from cupaged.kernels.paged_kv import paged_kv
from cupaged.memory.arena import KVArena

NUM_THREADS = 128


def rope_arguments(rope: Rope, dtype: np.dtype, head_dim: int) -> tuple:
    """The kernels' arguments cos_sin, q_norm, k_norm, rotary_dim and eps for heads of this dtype. Raises ValueError for
    what doesn't fit them."""
    cos_sin, q_norm, k_norm, eps = rope
    check("cos_sin", cos_sin, (None, None), np.float32)
    rotary_dim = cos_sin.shape[1]
    check_that(
        rotary_dim % 16 == 0 and 0 < rotary_dim <= head_dim,
        f"cos_sin: rotary_dim must be a multiple of 16 up to head_dim {head_dim}; got {rotary_dim}",
    )
    check_vectors("cos_sin", cos_sin, rotary_dim)
    check_that((q_norm is None) == (k_norm is None), "q_norm, k_norm: give both or neither")
    if q_norm is None:
        q_norm = k_norm = NULL
    else:
        for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
            check(name, weight, (head_dim,), dtype)
            check_vectors(name, weight, head_dim)
    return cos_sin, q_norm, k_norm, np.int32(rotary_dim), np.float32(eps)


def rope_and_store_kv(
    qkv,
    arena: KVArena,
    layer: int,
    positions,
    slot_mapping,
    cos_sin,
    num_heads: int,
    q_norm=None,
    k_norm=None,
    eps: float = 0.0,
) -> None:
    """Rotate q and k by their positions, q in place, and write k and v to their slots of the cache's `layer`.

    qkv [n, (num_heads + 2 * num_kv_heads) * head_dim] in the cache's dtype, bf16 or fp16; the key and value heads stay
    as they are. positions, slot_mapping [n] int32; slot -1 writes nothing. cos_sin [max_positions, rotary_dim]
    float32: cosines, then sines; rotary_dim is a multiple of 16. q_norm, k_norm [head_dim]: both or neither; given,
    each head is RMS-normed with them and eps before the rotation.

    Positions must lie below max_positions and slots in the arena: they are device data and aren't checked. Raises
    ValueError for everything else that doesn't fit.
    """
    layout = arena.layout
    head_dim, num_kv_heads = layout.head_dim, layout.num_kv_heads
    total_heads = num_heads + 2 * num_kv_heads
    check_dtype("qkv", qkv, HALF_TYPES)
    check("qkv", qkv, (None, total_heads * head_dim), layout.dtype)
    num_tokens = qkv.shape[0]
    check("positions", positions, (num_tokens,), np.int32)
    check("slot_mapping", slot_mapping, (num_tokens,), np.int32)
    check_that(head_dim in HEAD_DIMS, f"arena: head_dim must be one of {HEAD_DIMS}; got {head_dim}")
    check_that(
        layout.block_size in BLOCK_SIZES, f"arena: block_size must be one of {BLOCK_SIZES}; got {layout.block_size}"
    )
    check_that(0 <= layer < layout.num_layers, f"layer: must be 0 to {layout.num_layers - 1}; got {layer}")
    rope = rope_arguments(Rope(cos_sin, q_norm, k_norm, eps), qkv.dtype, head_dim)
    check_vectors("qkv", qkv, head_dim)
    if num_tokens == 0:
        return
    norm = q_norm is not None
    kernel = load_kernel("rope.cu", _name(qkv.dtype, head_dim, layout.block_size, norm))
    args = (qkv, positions, slot_mapping, *rope, paged_kv(arena, layer), np.int32(num_heads))
    heads_per_block = NUM_THREADS // _lanes_per_head(head_dim)
    kernel((num_tokens, ceil_div(total_heads, heads_per_block)), (NUM_THREADS,), args)


def instantiations() -> Iterator[tuple[str, str]]:
    for dtype in HALF_TYPES:
        for head_dim in HEAD_DIMS:
            for block_size in BLOCK_SIZES:
                for norm in (False, True):
                    yield "rope.cu", _name(dtype, head_dim, block_size, norm)


def _name(dtype, head_dim: int, block_size: int, norm: bool) -> str:
    return f"rope_and_store_kv<{C_TYPE[dtype]}, {head_dim}, {block_size}, {str(norm).lower()}, {NUM_THREADS}>"


def _lanes_per_head(head_dim: int) -> int:
    """As in rope.cu: 16 elements a lane, rounded up to a power of two."""
    return 1 << (ceil_div(head_dim, 16) - 1).bit_length()
