"""out = x @ weight^T + bias, out += that, or SwiGLU of it, for any number of rows."""

from __future__ import annotations

import enum
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


class Epilogue(enum.IntEnum):
    """What becomes of the sums; twin in linear_epilogue.cuh."""

    STORE = 0
    ACCUMULATE = 1
    SILU_AND_MUL = 2


def linear(out, x, weight, bias=None, *, accumulate: bool = False, tile: LinearTile | None = None) -> None:
    """out = x @ weight^T + bias, or out += that where `accumulate` asks for it: x [m, k], weight [n, k], bias [n]
    bfloat16 or float16, out [m, n] of that dtype or float32 (to accumulate, float32), apart from the others.

    k is a multiple of 8. A row of out depends on its row of x alone, bit for bit, whatever m, n and the tile (by
    default the one that tuning.linear_tile chooses). Raises ValueError for arrays that don't fit together.
    """
    _launch(out, x, weight, bias, Epilogue.ACCUMULATE if accumulate else Epilogue.STORE, tile)


def linear_silu_and_mul(out, x, weight, *, tile: LinearTile | None = None) -> None:
    """out = silu(x @ gate^T) * (x @ up^T), rounded once: x [m, k], weight [2 * n, k], whose rows 2i and 2i + 1 are rows
    i of gate and up, and out [m, n] of one dtype, bfloat16 or float16. The rest as in `linear`.
    """
    _launch(out, x, weight, None, Epilogue.SILU_AND_MUL, tile)


def _launch(out, x, weight, bias, epilogue: Epilogue, tile: LinearTile | None) -> None:
    m, n, k = check_linear(out, x, weight, bias, epilogue)
    if m == 0 or n == 0:
        return
    tile = tile or linear_tile(m, n, device_info())
    grid = (ceil_div(m, tile.tile_m) * ceil_div(n, tile.tile_n),)
    sizes = (np.int32(m), np.int32(n), np.int32(k))
    args = (out, x, weight, NULL if bias is None else bias, *sizes, np.int32(epilogue))
    load_kernel("linear.cu", _name(x.dtype, out.dtype, tile))(grid, (tile.num_threads,), args, tile.shared_bytes)


def check_linear(out, x, weight, bias, epilogue: Epilogue) -> tuple[int, int, int]:
    """Check the operands of a linear operation; returns (m, n, k), the shapes of x [m, k] and weight [n, k]."""
    check_dtype("x", x, HALF_TYPES)
    check("x", x, (None, None), x.dtype)
    m, k = x.shape
    check("weight", weight, (None, k), x.dtype)
    n = weight.shape[0]
    if bias is not None:
        check("bias", bias, (n,), x.dtype)
    columns, out_dtypes = n, (x.dtype, FLOAT32)
    if epilogue is Epilogue.ACCUMULATE:
        out_dtypes = (FLOAT32,)
    elif epilogue is Epilogue.SILU_AND_MUL:
        check_that(n % 2 == 0, f"weight: rows must be pairs of gate and up; got {n}")
        columns, out_dtypes = n // 2, (x.dtype,)
    check_dtype("out", out, out_dtypes)
    check("out", out, (m, columns), out.dtype)
    check_that(k > 0, "x: rows must not be empty")
    check_that(max(m, n, k) < 2**30, f"x, weight: sizes must stay below 2^30; got m {m}, n {n}, k {k}")
    check_vectors("x", x, k)
    check_vectors("weight", weight, k)
    if columns * out.dtype.itemsize % VECTOR_BYTES == 0:  # else its rows are stored element by element
        check_vectors("out", out, columns)
    return m, n, k


def instantiations() -> Iterator[tuple[str, str]]:
    """Every (file, name) that is loaded here."""
    for dtype in HALF_TYPES:
        for out_dtype in (dtype, FLOAT32):
            for tile in LINEAR_TILES:
                yield "linear.cu", _name(dtype, out_dtype, tile)


def _name(dtype, out_dtype, tile: LinearTile) -> str:
    sizes = f"{tile.tile_m}, {tile.tile_n}, {tile.warps_m}, {tile.warps_n}, {tile.stages}"
    return f"linear<{C_TYPE[dtype]}, {C_TYPE[out_dtype]}, {sizes}>"
