"""RMSNorm, alone and after the residual's addition; the kernel is cuda_src/rms_norm.cu."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupaged.kernels.checks import C_TYPE, HALF_TYPES, check, check_dtype, check_that, check_vectors
from cupaged.kernels.compile import NULL, load_kernel

# (warps per thread block, vectors of 8 elements a thread), for rows of up to 256 * both: the first that fits is taken.
TILES = ((4, 1), (8, 1), (16, 1), (32, 1), (32, 2), (32, 4))
MAX_HIDDEN_SIZE = 256 * 32 * 4


def rms_norm(out, x, weight, eps: float) -> None:
    """out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight for x, out [n, hidden] and weight [hidden], bf16 or fp16.

    hidden is a multiple of 8 up to 32768; out must not overlap x. Raises ValueError for arrays that don't fit.
    """
    _launch(out, None, x, weight, eps)


def add_rms_norm(out, residual, x, weight, eps: float) -> None:
    """residual += x, rounded to its dtype; then out = rms_norm(residual). out, residual, x [n, hidden], apart."""
    _launch(out, residual, x, weight, eps)


def _launch(out, residual, x, weight, eps: float) -> None:
    check_dtype("x", x, HALF_TYPES)
    check("x", x, (None, None), x.dtype)
    num_tokens, hidden_size = x.shape
    check("out", out, x.shape, x.dtype)
    check("weight", weight, (hidden_size,), x.dtype)
    if residual is not None:
        check("residual", residual, x.shape, x.dtype)
        check_vectors("residual", residual, hidden_size)
    for name, array in ("x", x), ("out", out), ("weight", weight):
        check_vectors(name, array, hidden_size)
    check_that(0 < hidden_size <= MAX_HIDDEN_SIZE, f"x: hidden size must be 8 to {MAX_HIDDEN_SIZE}; got {hidden_size}")
    if num_tokens == 0:
        return
    num_warps, vecs_per_thread = next(tile for tile in TILES if hidden_size <= 256 * tile[0] * tile[1])
    kernel = load_kernel("rms_norm.cu", _name(x.dtype, residual is not None, num_warps, vecs_per_thread))
    args = (out, NULL if residual is None else residual, x, weight, np.int32(hidden_size), np.float32(eps))
    kernel((num_tokens,), (32 * num_warps,), args)


def instantiations() -> Iterator[tuple[str, str]]:
    for dtype in HALF_TYPES:
        for add_residual in (False, True):
            for tile in TILES:
                yield "rms_norm.cu", _name(dtype, add_residual, *tile)


def _name(dtype, add_residual: bool, num_warps: int, vecs_per_thread: int) -> str:
    return f"rms_norm<{C_TYPE[dtype]}, {str(add_residual).lower()}, {num_warps}, {vecs_per_thread}>"
