"""out = x @ weight^T + bias, or out += that, for any number of rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupaged.kernels.checks import (
    C_TYPE,
    FLOAT32,
    HALF_TYPES,
    VECTOR_BYTES,
    ceil_div,
    check,
    check_dtype,
    check_that,
    check_vectors,
)
from cupaged.kernels.compile import NULL, load_kernel
from cupaged.kernels.device import device_info
from cupaged.kernels.tuning import LINEAR_TILES, LinearTile, linear_tile


def linear(out, x, weight, bias=None, *, accumulate: bool = False, tile: LinearTile | None = None) -> None:
    """out = x @ weight^T + bias, or out += that where `accumulate` asks for it: x [m, k], weight [n, k], bias [n]
    bfloat16 or float16, out [m, n] of that dtype or float32 (to accumulate, float32), apart from the others.

    k is a multiple of 8. A row of out depends on its row of x alone, bit for bit, whatever m, n and the tile (by
    default the one that tuning.linear_tile chooses). Raises ValueError for arrays that don't fit together.
    """
    m, n, k = check_linear(out, x, weight, bias, accumulate)
    if m == 0 or n == 0:
        return
    tile = tile or linear_tile(m, n, device_info())
    grid = (ceil_div(m, tile.tile_m) * ceil_div(n, tile.tile_n),)
    sizes = (np.int32(m), np.int32(n), np.int32(k))
    args = (out, x, weight, NULL if bias is None else bias, *sizes, np.int32(accumulate))
    load_kernel("linear.cu", _name(x.dtype, out.dtype, tile))(grid, (tile.num_threads,), args, tile.shared_bytes)


def check_linear(out, x, weight, bias, accumulate: bool) -> tuple[int, int, int]:
    """Check the operands of a linear operation; returns (m, n, k)."""
    check_dtype("x", x, HALF_TYPES)
    check("x", x, (None, None), x.dtype)
    m, k = x.shape
    check("weight", weight, (None, k), x.dtype)
    n = weight.shape[0]
    if bias is not None:
        check("bias", bias, (n,), x.dtype)
    check_dtype("out", out, (x.dtype, FLOAT32))
    check("out", out, (m, n), out.dtype)
    check_that(not accumulate or out.dtype == FLOAT32, f"out: dtype must be float32 to accumulate; got {out.dtype}")
    check_that(k > 0, "x: rows must not be empty")
    check_that(max(m, n, k) < 2**30, f"x, weight: sizes must stay below 2^30; got m {m}, n {n}, k {k}")
    check_vectors("x", x, k)
    check_vectors("weight", weight, k)
    if n * out.dtype.itemsize % VECTOR_BYTES == 0:  # else its rows are stored element by element
        check_vectors("out", out, n)
    return m, n, k


def instantiations() -> Iterator[tuple[str, str]]:
    """Every (file, name) that `linear` may load."""
    for dtype in HALF_TYPES:
        for out_dtype in (dtype, FLOAT32):
            for tile in LINEAR_TILES:
                yield "linear.cu", _name(dtype, out_dtype, tile)


def _name(dtype, out_dtype, tile: LinearTile) -> str:
    sizes = f"{tile.tile_m}, {tile.tile_n}, {tile.warps_m}, {tile.warps_n}, {tile.stages}"
    return f"linear<{C_TYPE[dtype]}, {C_TYPE[out_dtype]}, {sizes}>"
