"""The operations of linear.py for at most 16 rows, at the speed at which weight can be read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupaged.kernels.checks import C_TYPE, FLOAT32, HALF_TYPES, ceil_div, check_that
from cupaged.kernels.compile import NULL, load_kernel
from cupaged.kernels.device import device_info
from cupaged.kernels.linear import Epilogue, check_linear
from cupaged.kernels.tuning import LINEAR_SMALL_ROWS, LINEAR_SMALL_TILES, LinearSmallTile, linear_small_tile

MAX_ROWS = LINEAR_SMALL_ROWS  # of x; more are for `linear`
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


def _launch(out, x, weight, bias, epilogue: Epilogue, tile: LinearSmallTile | None) -> None:
    m, n, k = check_linear(out, x, weight, bias, epilogue)
    check_that(m <= MAX_ROWS, f"x: linear_small takes at most {MAX_ROWS} rows; got {m}, use linear")
    if m == 0 or n == 0:
        return
    tile = tile or linear_small_tile(m, n, device_info())
    check_that(m <= 8 * tile.token_tiles, f"tile: {8 * tile.token_tiles} tokens are too few for the {m} rows of x")
    sizes = (np.int32(m), np.int32(n), np.int32(k))
    args = (out, x, weight, NULL if bias is None else bias, *sizes, np.int32(epilogue))
    kernel = load_kernel("linear_small.cu", _name(x.dtype, out.dtype, tile))
    kernel((ceil_div(n, 16 * tile.row_tiles),), (NUM_THREADS,), args, tile.shared_bytes)


def instantiations() -> Iterator[tuple[str, str]]:
    """Every (file, name) that is loaded here."""
    for dtype in HALF_TYPES:
        for out_dtype in (dtype, FLOAT32):
            for tile in LINEAR_SMALL_TILES:
                yield "linear_small.cu", _name(dtype, out_dtype, tile)


def _name(dtype, out_dtype, tile: LinearSmallTile) -> str:
    sizes = f"{tile.row_tiles}, {tile.token_tiles}, {tile.stages}"
    return f"linear_small<{C_TYPE[dtype]}, {C_TYPE[out_dtype]}, {sizes}>"
