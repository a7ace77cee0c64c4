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
from cupaged.kernels.device import DeviceInfo, device_info
from cupaged.kernels.tuning import LINEAR_TILE_K, LINEAR_TILES, LinearPlan, LinearTile, linear_plan, max_partial_floats

COUNTERS_SIZE = 4096  # bytes at the start of a workspace: one int32 for each tile whose k is split


class Epilogue(enum.IntEnum):
    """What becomes of the sums; twin in linear_epilogue.cuh."""

    STORE = 0
    ACCUMULATE = 1
    SILU_AND_MUL = 2


def linear_workspace_size(device: DeviceInfo) -> int:
    """Bytes of `workspace` that suffice for every shape: 8.7 MB on an H100."""
    return COUNTERS_SIZE + 4 * max_partial_floats(device)


def linear(
    out, x, weight, bias=None, *, accumulate: bool = False, workspace=None, plan: LinearPlan | None = None
) -> None:
    """out = x @ weight^T + bias, or out += that where `accumulate` asks for it: x [m, k], weight [n, k], bias [n]
    bfloat16 or float16, out [m, n] of that dtype or float32 (to accumulate, float32), apart from the others.

    k is a multiple of 8. workspace: uint8, `linear_workspace_size` bytes, zeros before its first use, in which steps of
    up to 64 rows may leave partial sums, so that k is split over thread blocks and n need not be large; what a launch
    leaves in it suits the next one. Without it k is not split. plan: the tile and the splits, by default what
    tuning.linear_plan chooses.

    A row of out depends on its row of x alone, bit for bit, among all m above 64, among all m up to 64 (with the same
    workspace or none, on the same kind of GPU), and among all m with plans of as many splits. Raises ValueError for
    arrays that don't fit together.
    """
    _launch(out, x, weight, bias, Epilogue.ACCUMULATE if accumulate else Epilogue.STORE, workspace, plan)


def linear_silu_and_mul(out, x, weight, *, workspace=None, plan: LinearPlan | None = None) -> None:
    """out = silu(x @ gate^T) * (x @ up^T), rounded once: x [m, k], weight [2 * n, k], whose rows 2i and 2i + 1 are rows
    i of gate and up, and out [m, n] of one dtype, bfloat16 or float16. The rest as in `linear`.
    """
    _launch(out, x, weight, None, Epilogue.SILU_AND_MUL, workspace, plan)


def _launch(out, x, weight, bias, epilogue: Epilogue, workspace, plan: LinearPlan | None) -> None:
    m, n, k = check_linear(out, x, weight, bias, epilogue)
    if m == 0 or n == 0:
        return
    if plan is None:
        plan = linear_plan(m, n, k, device_info())
        if workspace is None:
            plan = plan._replace(num_splits=1)
    tile, num_splits = plan
    steps = ceil_div(k, LINEAR_TILE_K)
    check_that(1 <= num_splits <= steps, f"plan: {k} columns can be split in 1 to {steps}; got {num_splits} splits")
    num_tiles = ceil_div(m, tile.tile_m) * ceil_div(n, tile.tile_n)
    partials, counters = NULL, NULL
    if num_splits > 1:
        partials, counters = _scratch(workspace, num_tiles, num_splits * tile.tile_m * tile.tile_n)
    sizes = (np.int32(m), np.int32(n), np.int32(k), np.int32(num_splits))
    args = (out, x, weight, NULL if bias is None else bias, partials, counters, *sizes, np.int32(epilogue))
    kernel = load_kernel("linear.cu", _name(x.dtype, out.dtype, tile))
    kernel((num_tiles * num_splits,), (tile.num_threads,), args, tile.shared_bytes)


def _scratch(workspace, num_tiles: int, floats_per_tile: int):
    """(partial sums, counters), parts of the workspace. The counters have a place where no shape's partial sums come:
    they must stay zeros between launches."""
    check_that(workspace is not None, "workspace: splits of k need one; got None")
    check("workspace", workspace, (None,), np.uint8)
    wanted = COUNTERS_SIZE + 4 * num_tiles * floats_per_tile
    check_that(workspace.shape[0] >= wanted, f"workspace: expected {wanted} bytes or more; got {workspace.shape[0]}")
    check_that(
        4 * num_tiles <= COUNTERS_SIZE, f"plan: at most {COUNTERS_SIZE // 4} tiles can be split; got {num_tiles}"
    )
    check_vectors("workspace", workspace, VECTOR_BYTES)
    return workspace[COUNTERS_SIZE:wanted].view(np.float32), workspace[:COUNTERS_SIZE].view(np.int32)


def check_linear(out, x, weight, bias, epilogue: Epilogue, norm=None) -> tuple[int, int, int]:
    """Check the operands of a linear operation, of rms_norm(x) if there is the norm's weight; returns (m, n, k), the
    shapes of x [m, k] and weight [n, k]."""
    dtype = x.dtype
    if norm is None:
        check_dtype("x", x, HALF_TYPES)
    else:
        check_dtype("x", x, (FLOAT32,))
        check_dtype("weight", weight, HALF_TYPES)
        dtype = weight.dtype
    check("x", x, (None, None), x.dtype)
    m, k = x.shape
    check("weight", weight, (None, k), dtype)
    n = weight.shape[0]
    if norm is not None:
        check("norm", norm, (k,), dtype)
        check_vectors("norm", norm, k)
    if bias is not None:
        check("bias", bias, (n,), dtype)
    columns, out_dtypes = n, (dtype, FLOAT32)
    if epilogue is Epilogue.ACCUMULATE:
        out_dtypes = (FLOAT32,)
    elif epilogue is Epilogue.SILU_AND_MUL:
        check_that(n % 2 == 0, f"weight: rows must be pairs of gate and up; got {n}")
        columns, out_dtypes = n // 2, (dtype,)
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
