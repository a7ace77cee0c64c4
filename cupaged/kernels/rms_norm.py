"""RMSNorm of float32 rows to 16-bit ones; the kernel is cuda_src/rms_norm.cu."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupaged.kernels.checks import C_TYPE, FLOAT32, HALF_TYPES, check, check_dtype, check_that, check_vectors
from cupaged.kernels.compile import load_kernel

# (warps per thread block, groups of 8 elements a thread), for rows of up to 256 * both: the first that fits is taken.
TILES = ((4, 1), (4, 2), (8, 2), (16, 2), (32, 2), (32, 4))
MAX_HIDDEN_SIZE = 256 * 32 * 4


def rms_norm(out, x, weight, eps: float) -> None:
    """out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight: x [n, hidden] fp32, weight [hidden] and out [n, hidden] bf16
    or fp16.

    hidden is a multiple of 8 up to 32768; out must not overlap x. Raises ValueError for arrays that don't fit.
    """
    check("x", x, (None, None), FLOAT32)
    num_tokens, hidden_size = x.shape
    check_dtype("out", out, HALF_TYPES)
    check("out", out, x.shape, out.dtype)
    check("weight", weight, (hidden_size,), out.dtype)
    for name, array in ("out", out), ("x", x), ("weight", weight):
        check_vectors(name, array, hidden_size)
    check_that(0 < hidden_size <= MAX_HIDDEN_SIZE, f"x: hidden size must be 8 to {MAX_HIDDEN_SIZE}; got {hidden_size}")
    if num_tokens == 0:
        return
    num_warps, groups_per_thread = next(tile for tile in TILES if hidden_size <= 256 * tile[0] * tile[1])
    kernel = load_kernel("rms_norm.cu", _name(out.dtype, num_warps, groups_per_thread))
    kernel((num_tokens,), (32 * num_warps,), (out, x, weight, np.int32(hidden_size), np.float32(eps)))


def instantiations() -> Iterator[tuple[str, str]]:
    for dtype in HALF_TYPES:
        for tile in TILES:
            yield "rms_norm.cu", _name(dtype, *tile)


def _name(dtype, num_warps: int, groups_per_thread: int) -> str:
    return f"rms_norm<{C_TYPE[dtype]}, {num_warps}, {groups_per_thread}>"
