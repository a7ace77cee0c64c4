"""The operations of linear.py for at most 16 rows, at the speed at which weight can be read; also of rows that are to
be normed first."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupaged.kernels.checks import C_TYPE, FLOAT32, HALF_TYPES, ceil_div, check_that
from cupaged.kernels.compile import NULL, load_kernel
from cupaged.kernels.device import device_info
from cupaged.kernels.linear import Epilogue, check_linear
from cupaged.kernels.tuning import (
    LINEAR_SMALL_NORMED_COLUMNS,
    LINEAR_SMALL_NORMED_ROWS,
    LINEAR_SMALL_NORMED_TILES,
    LINEAR_SMALL_ROWS,
    LINEAR_SMALL_TILES,
    LinearSmallTile,
    linear_small_tile,
)

MAX_ROWS = LINEAR_SMALL_ROWS  # of x; more are for `linear`
MAX_NORMED_ROWS = LINEAR_SMALL_NORMED_ROWS  # of x that is normed; of more, norms are for `rms_norm`
MAX_NORMED_COLUMNS = LINEAR_SMALL_NORMED_COLUMNS  # the same
NUM_THREADS = 256  # kWarps in linear_small.cu


def linear_small(out, x, weight, bias=None, *, accumulate: bool = False, tile: LinearSmallTile | None = None) -> None:
    """out = x @ weight^T + bias, or out += that, as in `linear`, for x of at most 16 rows.

    A row of out depends on its row of x alone, bit for bit, whatever m, n and the tile (by default the one that
    tuning.linear_small_tile chooses). `linear` sums in other orders, so its rows are the same to rounding only.
    """
    _launch(out, x, weight, bias, Epilogue.ACCUMULATE if accumulate else Epilogue.STORE, tile)


def linear_small_silu_and_mul(out, x, weight, *, tile: LinearSmallTile | None = None) -> None:
    """out = silu(x @ gate^T) * (x @ up^T) as in `linear_silu_and_mul`, for x of at most 16 rows."""
    _launch(out, x, weight, None, Epilogue.SILU_AND_MUL, tile)


def rms_norm_linear_small(out, x, norm, eps: float, weight, bias=None, *, tile: LinearSmallTile | None = None) -> None:
    """out = rms_norm(x) @ weight^T + bias in one launch: x [m, k] float32, of at most 8 rows and 2,048 columns; norm
    [k], weight and bias bfloat16 or float16. rms_norm as in the launcher of that name, rounded to that type before the
    products.

    A row of out depends on its row of x alone, bit for bit, as in `linear_small`.
    """
    _launch(out, x, weight, bias, Epilogue.STORE, tile, norm, eps)


def rms_norm_linear_small_silu_and_mul(
    out, x, norm, eps: float, weight, *, tile: LinearSmallTile | None = None
) -> None:
    """out = silu(rms_norm(x) @ gate^T) * (rms_norm(x) @ up^T), the operands as in `rms_norm_linear_small`."""
    _launch(out, x, weight, None, Epilogue.SILU_AND_MUL, tile, norm, eps)


def _launch(
    out, x, weight, bias, epilogue: Epilogue, tile: LinearSmallTile | None, norm=None, eps: float = 0.0
) -> None:
    m, n, k = check_linear(out, x, weight, bias, epilogue, norm)
    check_that(m <= MAX_ROWS, f"x: linear_small takes at most {MAX_ROWS} rows; got {m}, use linear")
    if norm is not None:
        for what, size, most in (("rows", m, MAX_NORMED_ROWS), ("columns", k, MAX_NORMED_COLUMNS)):
            check_that(size <= most, f"x: linear_small norms at most {most} {what}; got {size}, use rms_norm")
    if m == 0 or n == 0:
        return
    tile = tile or linear_small_tile(m, n, device_info())
    check_that(m <= 8 * tile.token_tiles, f"tile: {8 * tile.token_tiles} tokens are too few for the {m} rows of x")
    pointers = (out, x, weight, NULL if bias is None else bias, NULL if norm is None else norm)
    args = (*pointers, np.int32(m), np.int32(n), np.int32(k), np.int32(epilogue), np.float32(eps))
    kernel = load_kernel("linear_small.cu", _name(weight.dtype, out.dtype, x.dtype, tile))
    shared_bytes = tile.shared_bytes if norm is None else tile.normed_shared_bytes
    kernel((ceil_div(n, 16 * tile.row_tiles),), (NUM_THREADS,), args, shared_bytes)


def instantiations() -> Iterator[tuple[str, str]]:
    """Every (file, name) that is loaded here."""
    for dtype in HALF_TYPES:
        for out_dtype in (dtype, FLOAT32):
            for x_dtype, tiles in ((dtype, LINEAR_SMALL_TILES), (FLOAT32, LINEAR_SMALL_NORMED_TILES)):
                for tile in tiles:
                    yield "linear_small.cu", _name(dtype, out_dtype, x_dtype, tile)


def _name(dtype, out_dtype, x_dtype, tile: LinearSmallTile) -> str:
    sizes = f"{tile.row_tiles}, {tile.token_tiles}, {tile.stages}"
    return f"linear_small<{C_TYPE[dtype]}, {C_TYPE[out_dtype]}, {C_TYPE[x_dtype]}, {sizes}>"
