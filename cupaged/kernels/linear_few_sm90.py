"""The operations of linear.py for few rows on Hopper, at the speed at which weight can be read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupaged.kernels.checks import C_TYPE, FLOAT32, HALF_TYPES, ceil_div, check_that
from cupaged.kernels.compile import NULL, load_kernel
from cupaged.kernels.device import device_info
from cupaged.kernels.linear import Epilogue, check_linear
from cupaged.kernels.tensor_map import tensor_map
from cupaged.kernels.tuning import (
    LINEAR_FEW_ROWS,
    LINEAR_FEW_TILES,
    LinearFewTile,
    linear_few_max_rows,
    linear_few_tile,
)

NUM_THREADS = 160  # four warps that multiply, and one that fetches


def linear_few_sm90(
    out,
    x,
    weight,
    bias=None,
    *,
    accumulate: bool = False,
    tile: LinearFewTile | None = None,
    num_blocks: int | None = None,
) -> None:
    """out = x @ weight^T + bias, or out += that, as in `linear`, for x of at most 64 rows, or 128 where weight is small
    (tuning.linear_few_max_rows), on a GPU of architecture sm_90a.

    tile: by default what tuning.linear_few_tile chooses. num_blocks: how many thread blocks share the tiles where k is
    not split, at most; by default as many as have room on the GPU at once. A row of out depends on its row of x and on
    tile.splits alone, bit for bit, whatever m, n, num_blocks and the rest of the tile; by default splits are a function
    of the weight's shape and the GPU. The other kernels sum in other orders, so their rows are the same to rounding
    only.
    """
    _launch(out, x, weight, bias, Epilogue.ACCUMULATE if accumulate else Epilogue.STORE, tile, num_blocks)


def linear_few_sm90_silu_and_mul(
    out, x, weight, *, tile: LinearFewTile | None = None, num_blocks: int | None = None
) -> None:
    """out = silu(x @ gate^T) * (x @ up^T) as in `linear_silu_and_mul`, for x of as few rows as in `linear_few_sm90`,
    on a GPU of architecture sm_90a."""
    _launch(out, x, weight, None, Epilogue.SILU_AND_MUL, tile, num_blocks)


def _launch(out, x, weight, bias, epilogue: Epilogue, tile: LinearFewTile | None, num_blocks: int | None) -> None:
    m, n, k = check_linear(out, x, weight, bias, epilogue)
    if m == 0 or n == 0:
        return
    if tile is None:
        most = linear_few_max_rows(n, k, device_info())
        check_that(
            m <= most, f"x: linear_few_sm90 takes at most {most} rows with this weight; got {m}, use linear_sm90"
        )
        tile = linear_few_tile(m, n, k, device_info())
    check_that(m <= tile.tokens, f"tile: {tile.tokens} tokens are too few for the {m} rows of x")
    maps = (tensor_map(x, tile.tokens, 128), tensor_map(weight, LINEAR_FEW_ROWS, 128))
    args = (out, *maps, NULL if bias is None else bias, np.int32(m), np.int32(n), np.int32(k), np.int32(epilogue))
    kernel = load_kernel("linear_few_sm90.cu", _name(x.dtype, out.dtype, tile))
    num_tiles = ceil_div(n, LINEAR_FEW_ROWS)
    at_once = num_blocks or tile.blocks_at_once(device_info())
    grid = num_tiles * tile.splits if tile.splits > 1 else min(num_tiles, at_once)
    kernel((grid,), (NUM_THREADS,), args, tile.shared_bytes)


def instantiations() -> Iterator[tuple[str, str]]:
    """Every (file, name) that is loaded here."""
    for dtype in HALF_TYPES:
        for out_dtype in (dtype, FLOAT32):
            for tile in LINEAR_FEW_TILES:
                yield "linear_few_sm90.cu", _name(dtype, out_dtype, tile)


def _name(dtype, out_dtype, tile: LinearFewTile) -> str:
    sizes = f"{tile.tokens}, {tile.stages}, {tile.splits}"
    return f"linear_few_sm90<{C_TYPE[dtype]}, {C_TYPE[out_dtype]}, {sizes}>"
