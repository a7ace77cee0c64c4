"""The operations of linear.py for many rows, on Hopper."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupaged.kernels.checks import C_TYPE, FLOAT32, HALF_TYPES, ceil_div
from cupaged.kernels.compile import NULL, load_kernel
from cupaged.kernels.device import device_info
from cupaged.kernels.linear import Epilogue, check_linear
from cupaged.kernels.tuning import LINEAR_SM90_TILES, LinearSm90Tile, linear_sm90_tile

MIN_ROWS = 65  # of x, to be worth a tile of 128; any number is right
NUM_THREADS = 384  # a warpgroup that fetches, two that multiply


def linear_sm90(
    out,
    x,
    weight,
    bias=None,
    *,
    accumulate: bool = False,
    tile: LinearSm90Tile | None = None,
    num_blocks: int | None = None,
) -> None:
    """out = x @ weight^T + bias, or out += that, as in `linear`, on a GPU of architecture sm_90a.

    A row of out depends on its row of x alone, bit for bit, whatever m, n, the tile (by default the one that
    tuning.linear_sm90_tile chooses) and the number of thread blocks (by default one an SM). `linear` sums in another
    order, so its rows are the same to rounding only.
    """
    _launch(out, x, weight, bias, Epilogue.ACCUMULATE if accumulate else Epilogue.STORE, tile, num_blocks)


def linear_sm90_silu_and_mul(
    out, x, weight, *, tile: LinearSm90Tile | None = None, num_blocks: int | None = None
) -> None:
    """out = silu(x @ gate^T) * (x @ up^T) as in `linear_silu_and_mul`, on a GPU of architecture sm_90a."""
    _launch(out, x, weight, None, Epilogue.SILU_AND_MUL, tile, num_blocks)


def _launch(out, x, weight, bias, epilogue: Epilogue, tile: LinearSm90Tile | None, num_blocks: int | None) -> None:
    m, n, k = check_linear(out, x, weight, bias, epilogue)
    if m == 0 or n == 0:
        return
    tile = tile or linear_sm90_tile(m, n, device_info())
    num_tiles = ceil_div(m, tile.tile_m) * ceil_div(n, tile.tile_n)
    grid = (min(num_tiles, num_blocks or device_info().num_sms),)
    sizes = (np.int32(m), np.int32(n), np.int32(k))
    args = (out, x, weight, NULL if bias is None else bias, *sizes, np.int32(epilogue))
    load_kernel("linear_sm90.cu", _name(x.dtype, out.dtype, tile))(grid, (NUM_THREADS,), args, tile.shared_bytes)


def instantiations() -> Iterator[tuple[str, str]]:
    """Every (file, name) that is loaded here."""
    for dtype in HALF_TYPES:
        for out_dtype in (dtype, FLOAT32):
            for tile in LINEAR_SM90_TILES:
                yield "linear_sm90.cu", _name(dtype, out_dtype, tile)


def _name(dtype, out_dtype, tile: LinearSm90Tile) -> str:
    return f"linear_sm90<{C_TYPE[dtype]}, {C_TYPE[out_dtype]}, {tile.tile_n}, {tile.stages}>"
