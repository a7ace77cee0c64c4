"""The operations of linear.py for many rows, on Hopper."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupaged.kernels.checks import C_TYPE, FLOAT32, HALF_TYPES, ceil_div, check_that
from cupaged.kernels.compile import NULL, load_kernel
from cupaged.kernels.device import device_info
from cupaged.kernels.linear import Epilogue, check_linear
from cupaged.kernels.tensor_map import tensor_map
from cupaged.kernels.tuning import LINEAR_SM90_PLANS, LINEAR_TILE_K, LinearSm90Plan, linear_sm90_plan

LAST_ROWS = 16  # kLastRows in linear_sm90.cu
NUM_THREADS = 384  # a warpgroup that fetches, two that multiply


def linear_sm90(
    out,
    x,
    weight,
    bias=None,
    *,
    accumulate: bool = False,
    plan: LinearSm90Plan | None = None,
    num_blocks: int | None = None,
) -> None:
    """out = x @ weight^T + bias, or out += that, as in `linear`, on a GPU of architecture sm_90a.

    plan: the tile and the splits of k, by default what tuning.linear_sm90_plan chooses. num_blocks: thread blocks where
    k is not split, by default one an SM.

    A row of out depends on its row of x alone, bit for bit, among all m of a class (up to 128, 256, 512, and above; on
    the same kind of GPU), and among all m with plans of as many splits. `linear` sums in another order, so its rows are
    the same to rounding only.
    """
    epilogue = Epilogue.ACCUMULATE if accumulate else Epilogue.STORE
    _launch(out, x, weight, bias, epilogue, plan, num_blocks)


def linear_sm90_silu_and_mul(
    out, x, weight, *, plan: LinearSm90Plan | None = None, num_blocks: int | None = None
) -> None:
    """out = silu(x @ gate^T) * (x @ up^T) as in `linear_silu_and_mul`, on a GPU of architecture sm_90a."""
    _launch(out, x, weight, None, Epilogue.SILU_AND_MUL, plan, num_blocks)


def _launch(out, x, weight, bias, epilogue: Epilogue, plan: LinearSm90Plan | None, num_blocks: int | None) -> None:
    m, n, k = check_linear(out, x, weight, bias, epilogue)
    if m == 0 or n == 0:
        return
    plan = plan or linear_sm90_plan(m, n, k, device_info())
    tile, num_splits = plan
    steps = ceil_div(k, LINEAR_TILE_K)
    check_that(num_splits <= steps, f"plan: {k} columns can be split in 1 to {steps}; got {num_splits} splits")
    num_tiles = ceil_div(m, tile.tile_m) * ceil_div(n, tile.tile_n)
    grid = (num_tiles * num_splits if num_splits > 1 else min(num_tiles, num_blocks or device_info().num_sms),)
    maps = tensor_map(x, tile.tile_m), tensor_map(x, LAST_ROWS), tensor_map(weight, tile.tile_n)
    sizes = (np.int32(m), np.int32(n), np.int32(k))
    args = (out, *maps, NULL if bias is None else bias, *sizes, np.int32(epilogue))
    load_kernel("linear_sm90.cu", _name(x.dtype, out.dtype, plan))(grid, (NUM_THREADS,), args, tile.shared_bytes)


def instantiations() -> Iterator[tuple[str, str]]:
    """Every (file, name) that is loaded here."""
    for dtype in HALF_TYPES:
        for out_dtype in (dtype, FLOAT32):
            for plan in LINEAR_SM90_PLANS:
                yield "linear_sm90.cu", _name(dtype, out_dtype, plan)


def _name(dtype, out_dtype, plan: LinearSm90Plan) -> str:
    sizes = f"{plan.tile.tile_n}, {plan.tile.stages}, {plan.num_splits}"
    return f"linear_sm90<{C_TYPE[dtype]}, {C_TYPE[out_dtype]}, {sizes}>"
