"""linear.cu and linear_small.cu against the formula in float64, and the choice of their tiles."""

from __future__ import annotations

import numpy as np
import pytest
from linear_tools import (
    H100,
    SIZES,
    assert_gated_matches_formula,
    assert_matches_formula,
    assert_only_theirs,
    chosen,
    gate_and_up,
    gated,
    guarded,
    operands,
    residual,
    run,
    silu,
)

from cupaged.kernels import linear as linear_module
from cupaged.kernels import linear_small as linear_small_module
from cupaged.kernels.checks import BFLOAT16, FLOAT16, FLOAT32, HALF_TYPES, ceil_div
from cupaged.kernels.device import DeviceInfo, set_device_info
from cupaged.kernels.linear import COUNTERS_SIZE, linear, linear_silu_and_mul, linear_workspace_size
from cupaged.kernels.linear_small import (
    MAX_NORMED_COLUMNS,
    MAX_NORMED_ROWS,
    MAX_ROWS,
    linear_small,
    linear_small_silu_and_mul,
    rms_norm_linear_small,
    rms_norm_linear_small_silu_and_mul,
)
from cupaged.kernels.tuning import (
    LINEAR_SMALL_NORMED_TILES,
    LINEAR_SMALL_TILES,
    LINEAR_TILES,
    SPLIT_ROWS,
    LinearPlan,
    LinearSmallTile,
    LinearTile,
    linear_plan,
    linear_small_tile,
    max_partial_floats,
)
from kernel_tools import SMALLEST_SUBNORMAL, UNIT_ROUNDOFF, assert_close, poisoned

A100 = DeviceInfo("sm_80", num_sms=108, max_shared_bytes=166912)
RTX_5090 = DeviceInfo("sm_120", num_sms=170, max_shared_bytes=101376)


def tile_id(tile: LinearTile | LinearSmallTile) -> str:
    return f"{tile.tile_m}x{tile.tile_n}" if isinstance(tile, LinearTile) else f"{tile.row_tiles}x{tile.token_tiles}"


def linear_cases():
    """Sizes around the tile's edges: one, just below, a whole tile, just above, several; k from one chunk of 8 to more
    stages than the ring has. The types take turns, so that each kernel is built for few of them."""
    for i, tile in enumerate(LINEAR_TILES):
        tm, tn = tile.tile_m, tile.tile_n
        dtype, out_dtype = [(BFLOAT16, BFLOAT16), (FLOAT16, FLOAT32)][i % 2]
        for m, n, k, with_bias in (
            (1, 1, 8, True),
            (tm, tn, 64, False),
            (tm - 1, tn + 1, 72, True),
            (tm + 1, tn - 1, 136, False),
            (17, tn + 8, 64 * tile.stages + 8, True),
        ):
            yield pytest.param(m, n, k, dtype, out_dtype, with_bias, tile, id=f"{tile_id(tile)}-{m}x{n}x{k}")
    smallest = LINEAR_TILES[-1]
    # 9 token tiles and 2 weight tiles: more than a group of the raster, with a ragged last one.
    yield pytest.param(8 * 64 + 1, 33, 16, BFLOAT16, BFLOAT16, True, smallest, id="raster")
    yield pytest.param(18, 40, 576, BFLOAT16, FLOAT32, False, smallest, id="bfloat16-to-float32")
    yield pytest.param(18, 40, 576, FLOAT16, FLOAT16, True, smallest, id="float16-to-float16")


def small_cases():
    """As above. k covers fewer chunks than warps, as many, one more, and rings that go round."""
    for i, tile in enumerate(LINEAR_SMALL_TILES):
        rows, tokens = 16 * tile.row_tiles, 8 * tile.token_tiles
        dtype, out_dtype = [(BFLOAT16, BFLOAT16), (FLOAT16, FLOAT32)][i % 2]
        for m, n, k, with_bias in (
            (1, 1, 8, True),
            (tokens, rows, 512, False),
            (tokens - 1, rows + 1, 520, True),
            (tokens - 7, rows - 1, 576, True),
            (tokens, 3 * rows + 1, 512 * (tile.stages + 1) + 24, False),
        ):
            yield pytest.param(m, n, k, dtype, out_dtype, with_bias, tile, id=f"{tile_id(tile)}-{m}x{n}x{k}")
    smallest = LINEAR_SMALL_TILES[0]
    yield pytest.param(3, 40, 136, BFLOAT16, FLOAT32, False, smallest, id="bfloat16-to-float32")
    yield pytest.param(3, 40, 136, FLOAT16, FLOAT16, True, smallest, id="float16-to-float16")


@pytest.mark.parametrize(("m", "n", "k", "dtype", "out_dtype", "with_bias", "tile"), list(linear_cases()))
def test_linear_matches_the_formula(runner, rng, m, n, k, dtype, out_dtype, with_bias, tile):
    x, weight, bias = operands(rng, m, n, k, dtype, with_bias)
    assert_matches_formula(run(runner, linear, x, weight, bias, out_dtype, tile), x, weight, bias)


@pytest.mark.parametrize(("m", "n", "k", "dtype", "out_dtype", "with_bias", "tile"), list(small_cases()))
def test_linear_small_matches_the_formula(runner, rng, m, n, k, dtype, out_dtype, with_bias, tile):
    x, weight, bias = operands(rng, m, n, k, dtype, with_bias)
    assert_matches_formula(run(runner, linear_small, x, weight, bias, out_dtype, tile), x, weight, bias)


# -- of rows that are normed first ---------------------------------------------------------------------------------

EPS = 0.1  # enough to show


def norm_operands(rng, m: int, k: int, dtype):
    """Rows of float32 of different sizes, the norm's weight, and the norm, rounded. No element of the norm is so near
    the middle between two numbers of dtype that float32's errors could round it to the other one."""
    norm = (1 + rng.standard_normal(k) / 4).astype(dtype)
    rows, normed = [], []
    while len(rows) < m:
        row = rng.standard_normal(k, np.float32) * np.float32(10.0 ** rng.integers(-1, 3))
        exact = row / np.sqrt(np.mean(np.square(row, dtype=np.float64)) + EPS) * norm.astype(np.float64)
        low, high = ((exact * (1 + error)).astype(dtype) for error in (-(2.0**-21), 2.0**-21))
        if np.array_equal(low, high):
            rows.append(row)
            normed.append(low)
    return np.array(rows), norm, np.array(normed)


def run_normed(runner, rows, norm, weight, bias, out_dtype, tile) -> np.ndarray:
    norm = guarded(runner, norm)[0]

    def operation(out, x, weight, bias, *, accumulate, tile):
        assert not accumulate
        rms_norm_linear_small(out, x, norm, EPS, weight, bias, tile=tile)

    return run(runner, operation, rows, weight, bias, out_dtype, tile)


@pytest.mark.parametrize(
    ("m", "n", "k", "with_bias", "tile", "dtype", "out_dtype"),
    [
        pytest.param(m, n, k, with_bias, tile, dtype, out_dtype, id=f"{tile_id(tile)}-{dtype}-{out_dtype}-{m}x{n}x{k}")
        for tile in LINEAR_SMALL_NORMED_TILES
        for dtype in HALF_TYPES
        for out_dtype in (dtype, FLOAT32)
        for m, n, k, with_bias in (
            (1, 40, 8, True),
            (4, 20, 64, True),
            (8, 16 * tile.row_tiles, 512, False),
            (7, 16 * tile.row_tiles + 1, 576, True),
            (8, 16 * tile.row_tiles, 1024, False),
            (6, 16 * tile.row_tiles, 1032, True),
            (1, 48 * tile.row_tiles - 1, MAX_NORMED_COLUMNS - 24, False),
            (8, 16 * tile.row_tiles + 1, MAX_NORMED_COLUMNS, True),
        )
    ],
)
def test_products_of_normed_rows_match_the_formula(runner, rng, m, n, k, with_bias, tile, dtype, out_dtype):
    _, weight, bias = operands(rng, m, n, k, dtype, with_bias)
    rows, norm, normed = norm_operands(rng, m, k, dtype)
    out = run_normed(runner, rows, norm, weight, bias, out_dtype, tile)
    assert_matches_formula(out, normed, weight, bias)


@pytest.mark.parametrize("tile", LINEAR_SMALL_NORMED_TILES, ids=tile_id)
def test_silu_and_mul_of_normed_rows_match_the_formula(runner, rng, tile):
    m, n, k = 7, 8 * tile.row_tiles + 8, 576
    _, gate, up = gate_and_up(rng, m, n, k, BFLOAT16)
    rows, norm, normed = norm_operands(rng, m, k, BFLOAT16)
    norm = guarded(runner, norm)[0]

    def operation(out, x, weight, *, tile):
        rms_norm_linear_small_silu_and_mul(out, x, norm, EPS, weight, tile=tile)

    found = gated(runner, operation, rows, gate, up, tile)
    assert_gated_matches_formula(found, normed, gate, up)


@pytest.mark.parametrize("k", [520, 1160, MAX_NORMED_COLUMNS])
def test_normed_rows_give_the_same_bits_in_every_tile_and_batch(runner, rng, k):
    _, weight, bias = operands(rng, 8, 50, k, BFLOAT16, True)
    rows, norm, _ = norm_operands(rng, 8, k, BFLOAT16)
    together = run_normed(runner, rows, norm, weight, bias, BFLOAT16, LINEAR_SMALL_NORMED_TILES[1])
    for tile in LINEAR_SMALL_NORMED_TILES:
        for some in (slice(1), slice(7, 8), slice(2, 7), slice(None)):
            alone = run_normed(runner, rows[some], norm, weight, bias, BFLOAT16, tile)
            assert np.array_equal(alone, together[some])


def test_a_nan_among_normed_rows_stays_in_its_row(runner, rng):
    _, weight, _ = operands(rng, 7, 20, 72, BFLOAT16, False)
    rows, norm, _ = norm_operands(rng, 7, 72, BFLOAT16)
    rows[3, 71] = np.nan
    out = run_normed(runner, rows, norm, weight, None, BFLOAT16, LINEAR_SMALL_TILES[0]).astype(np.float32)
    assert np.isnan(out[3]).all()
    assert np.isfinite(np.delete(out, 3, axis=0)).all()


def test_bad_operands_of_normed_products_are_named():
    out, weight, norm = (np.zeros(shape, BFLOAT16) for shape in ((4, 8), (8, 16), (16,)))
    x = np.zeros((4, 16), np.float32)
    with pytest.raises(ValueError, match="x: dtype must be float32; got bfloat16"):
        rms_norm_linear_small(out, x.astype(BFLOAT16), norm, EPS, weight)
    with pytest.raises(ValueError, match="weight: dtype must be bfloat16 or float16; got float32"):
        rms_norm_linear_small(out, x, norm, EPS, weight.astype(FLOAT32))
    with pytest.raises(ValueError, match=r"norm: expected shape \(16\) bfloat16"):
        rms_norm_linear_small(out, x, norm[:8], EPS, weight)
    with pytest.raises(ValueError, match=r"out: expected shape \(4, 4\)"):
        rms_norm_linear_small_silu_and_mul(out, x, norm, EPS, weight)
    with pytest.raises(ValueError, match="x: linear_small norms at most 8 rows; got 9, use rms_norm"):
        rms_norm_linear_small(np.zeros((9, 8), BFLOAT16), np.zeros((9, 16), FLOAT32), norm, EPS, weight)
    x, weight, norm = np.zeros((4, 2056), FLOAT32), np.zeros((8, 2056), BFLOAT16), np.zeros(2056, BFLOAT16)
    with pytest.raises(ValueError, match="x: linear_small norms at most 2048 columns; got 2056, use rms_norm"):
        rms_norm_linear_small(out, x, norm, EPS, weight)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize(
    ("operation", "m", "n", "k", "with_bias", "tile"),
    [
        pytest.param(operation, m, n, k, with_bias, tile, id=f"{operation.__name__}-{tile_id(tile)}-{m}x{n}x{k}")
        for operation, tile, tile_m, tile_n in (
            (linear, LINEAR_TILES[-1], 64, 32),
            (linear_small, LINEAR_SMALL_TILES[0], 8, 16),
        )
        # The last one's rows don't start at multiples of 16 bytes.
        for m, n, k, with_bias in (
            (tile_m, tile_n, 64, False),
            (tile_m - 3, 2 * tile_n + 4, 200, True),
            (3, 7, 8, True),
        )
    ],
)
def test_products_are_added_to_what_out_holds(runner, rng, operation, m, n, k, dtype, with_bias, tile):
    x, weight, bias = operands(rng, m, n, k, dtype, with_bias)
    added_to = residual(rng, m, n)
    out = run(runner, operation, x, weight, bias, FLOAT32, tile, added_to)
    assert_matches_formula(out, x, weight, bias, added_to)
    # To the bit it is the sum of the two, rounded once.
    products = run(runner, operation, x, weight, bias, FLOAT32, tile)
    assert np.array_equal(out, added_to + products)


def gated_cases():
    """Tile edges in the outputs' pairs; out's rows of whole 16 bytes, of less, and one element."""
    for operation, tiles in ((linear_silu_and_mul, LINEAR_TILES), (linear_small_silu_and_mul, LINEAR_SMALL_TILES)):
        for i, tile in enumerate(tiles):
            tile_m, tile_n = (
                (tile.tile_m, tile.tile_n)
                if isinstance(tile, LinearTile)
                else (8 * tile.token_tiles, 16 * tile.row_tiles)
            )
            for m, n, k in (
                (tile_m, tile_n // 2, 64),
                (tile_m - 1, tile_n // 2 + 8, 520),
                (2, tile_n - 1, 72),
                (1, 1, 8),
            ):
                id = f"{operation.__name__}-{tile_id(tile)}-{m}x{n}x{k}"
                yield pytest.param(operation, m, n, k, HALF_TYPES[i % 2], tile, id=id)


@pytest.mark.parametrize(("operation", "m", "n", "k", "dtype", "tile"), list(gated_cases()))
def test_silu_and_mul_of_products_match_the_formula(runner, rng, operation, m, n, k, dtype, tile):
    x, gate, up = gate_and_up(rng, m, n, k, dtype)
    assert_gated_matches_formula(gated(runner, operation, x, gate, up, tile), x, gate, up)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize(
    ("operation", "tile"),
    [(linear_silu_and_mul, LINEAR_TILES[-1]), (linear_small_silu_and_mul, LINEAR_SMALL_TILES[0])],
)
def test_extreme_gates(runner, operation, tile, dtype):
    """Where exp(-gate) passes 2^126, from gate = -87.3 on, silu becomes 0, off by at most 87.4 * exp(-87.3)."""
    largest = 65504 if dtype == FLOAT16 else 3e38
    gates = np.array([0, -0.0, largest, -largest, -87, -88, -89, -104, 1e-7, -1e-7, 100, -17, 17, np.inf, np.nan, 1])
    gates, ups = gates.astype(dtype), np.array([1] * 15 + [np.inf], dtype)
    x, gate, up = np.zeros((1, 8), dtype), np.zeros((16, 8), dtype), np.zeros((16, 8), dtype)
    x[0, 0], gate[:, 0], up[:, 0] = 1, gates, ups
    expected = silu(gates.astype(np.float64)) * ups.astype(np.float64)
    rtol = UNIT_ROUNDOFF[dtype] + (6 + 1.2 * 87.4) * 2.0**-24  # __expf errs by 2 + 1.2 * |gate| units
    tolerance = {"rtol": rtol, "atol": SMALLEST_SUBNORMAL[dtype] + 1.2e-36}
    assert_close(gated(runner, operation, x, gate, up, tile)[0], expected, **tolerance)


# -- splits of k ----------------------------------------------------------------------------------------------


def plan_id(plan: LinearPlan) -> str:
    return f"{tile_id(plan.tile)}-by-{plan.num_splits}"


def new_workspace(runner, plan: LinearPlan, m: int, n: int, *, extra: int = 0):
    """As large as the plan needs, with counters of zero and partial sums of NaN."""
    num_tiles = ceil_div(m, plan.tile.tile_m) * ceil_div(n, plan.tile.tile_n)
    size = 4 * num_tiles * plan.num_splits * plan.tile.tile_m * plan.tile.tile_n
    return runner.array(np.repeat([0, 255], [COUNTERS_SIZE, size + extra]).astype(np.uint8))


def assert_ready_for_the_next(runner, workspace, extra: int = 0):
    """Counters are zero, and what the plan doesn't need is as it was."""
    workspace = runner.host(workspace)
    assert (workspace[:COUNTERS_SIZE] == 0).all()
    assert (workspace[workspace.size - extra :] == 255).all()
    assert (workspace[COUNTERS_SIZE:] != 255).any()  # or else nothing was split


FEW_ROWS_TILES = [tile for tile in LINEAR_TILES if tile.tile_m == SPLIT_ROWS]


def split_cases():
    """Splits of as many steps and of fewer, down to one step; k that ends within a step; several tiles, ragged ones."""
    for i, tile in enumerate(FEW_ROWS_TILES):
        tn, dtype = tile.tile_n, HALF_TYPES[i % 2]
        for m, n, k, num_splits in (
            (17, tn, 256, 2),
            (64, tn + 1, 328, 4),
            (33, 2 * tn - 8, 1096, 5),
            (49, 8, 72, 2),
            (1, 3 * tn + 4, 520, 9),
            (66, 2 * tn, 200, 3),
        ):
            yield pytest.param(
                m, n, k, dtype, LinearPlan(tile, num_splits), id=f"{tile_id(tile)}-by-{num_splits}-{m}x{n}x{k}"
            )


@pytest.mark.parametrize(("m", "n", "k", "dtype", "plan"), list(split_cases()))
def test_splits_match_the_formula(runner, rng, m, n, k, dtype, plan):
    x, weight, bias = operands(rng, m, n, k, dtype, True)
    workspace = new_workspace(runner, plan, m, n, extra=64)
    out = run(runner, linear, x, weight, bias, dtype, plan, workspace=workspace)
    assert_matches_formula(out, x, weight, bias)
    assert_ready_for_the_next(runner, workspace, extra=64)


@pytest.mark.parametrize("plan", [LinearPlan(LINEAR_TILES[-1], 3)], ids=plan_id)
def test_splits_are_added_to_what_out_holds_once(runner, rng, plan):
    x, weight, bias = operands(rng, 20, 68, 264, BFLOAT16, True)
    added_to, workspace = residual(rng, 20, 68), new_workspace(runner, plan, 20, 68)
    out = run(runner, linear, x, weight, bias, FLOAT32, plan, added_to, workspace=workspace)
    assert_matches_formula(out, x, weight, bias, added_to)
    assert_ready_for_the_next(runner, workspace)


@pytest.mark.parametrize("plan", [LinearPlan(LINEAR_TILES[-1], 3)], ids=plan_id)
def test_silu_is_that_of_all_splits(runner, rng, plan):
    x, gate, up = gate_and_up(rng, 20, 40, 264, BFLOAT16)
    workspace = new_workspace(runner, plan, 20, 2 * 40)
    assert_gated_matches_formula(
        gated(runner, linear_silu_and_mul, x, gate, up, plan, workspace=workspace), x, gate, up
    )
    assert_ready_for_the_next(runner, workspace)


def test_launches_share_a_workspace(runner, rng):
    """Few large tiles and many small ones in turn: what one leaves behind suits the next, which finds its counters."""
    small, large = LINEAR_TILES[-1], FEW_ROWS_TILES[0]
    shapes = [(17, 40, 264, small, 4), (64, 300, 128, small, 2), (20, 8, 712, large, 9), (40, 150, 328, small, 5)]
    sizes = [4 * ceil_div(n, tile.tile_n) * num_splits * 64 * tile.tile_n for _, n, _, tile, num_splits in shapes]
    shared = runner.array(np.zeros(COUNTERS_SIZE + max(sizes), np.uint8))
    for m, n, k, tile, num_splits in shapes + shapes[::-1]:
        dtype, plan = (BFLOAT16, FLOAT16)[tile is large], LinearPlan(tile, num_splits)
        x, weight, bias = operands(rng, m, n, k, dtype, True)
        fresh = run(runner, linear, x, weight, bias, dtype, plan, workspace=new_workspace(runner, plan, m, n))
        assert (run(runner, linear, x, weight, bias, dtype, plan, workspace=shared) == fresh).all()


def test_as_many_splits_give_the_same_bits_in_every_tile_and_batch(runner, rng):
    x, weight, bias = operands(rng, 64, 70, 456, BFLOAT16, True)

    def product(rows: slice, tile: LinearTile) -> np.ndarray:
        plan, m = LinearPlan(tile, 3), len(x[rows])
        workspace = new_workspace(runner, plan, m, 70)
        return run(runner, linear, x[rows], weight, bias, BFLOAT16, plan, workspace=workspace)

    tiles = FEW_ROWS_TILES[0], FEW_ROWS_TILES[2]  # the ones that are built for bfloat16 anyway
    together = product(slice(None), tiles[0])
    assert (product(slice(None), tiles[1]) == together).all()
    for rows in (slice(1), slice(5, 22), slice(31, 64)):
        assert (product(rows, tiles[1]) == together[rows]).all()


@pytest.fixture
def h100():
    set_device_info(H100)
    yield H100
    set_device_info(None)


def test_the_chosen_plan_is_what_runs(runner, rng, h100):
    """Split where there is a workspace, else not; the rows of small steps are the same in all of them."""
    m, n, k = 20, 40, 2048
    plan = linear_plan(m, n, k, h100)
    assert plan.num_splits > 1
    x, weight, bias = operands(rng, m, n, k, BFLOAT16, True)
    workspace = runner.array(np.zeros(linear_workspace_size(h100), np.uint8))
    out, alone, unsplit = (runner.array(poisoned((rows, n), BFLOAT16)) for rows in (m, 1, m))
    x, weight, bias = (runner.array(values) for values in (x, weight, bias))
    linear(out, x, weight, bias, workspace=workspace)
    linear(alone, x[7:8], weight, bias, workspace=workspace)
    linear(unsplit, x, weight, bias)
    x, weight, bias, out = (runner.host(array) for array in (x, weight, bias, out))
    split = run(runner, linear, x, weight, bias, BFLOAT16, plan, workspace=workspace)
    assert (out == split).all()
    assert (runner.host(alone)[0] == out[7]).all()
    whole = run(runner, linear, x, weight, bias, BFLOAT16, plan._replace(num_splits=1))
    assert (runner.host(unsplit) == whole).all()


@pytest.mark.parametrize(
    ("num_splits", "workspace", "message"),
    [
        (2, None, "^workspace: splits of k need one; got None"),
        (
            2,
            np.zeros(COUNTERS_SIZE + 4 * 2 * 64 * 32 - 1, np.uint8),
            "^workspace: expected 20480 bytes or more; got 20479",
        ),
        (2, np.zeros(10000, np.float32), "^workspace: .* uint8"),
        (2, np.zeros(100000, np.uint8)[1:], "^workspace: must start at a multiple of 16 bytes"),
        (3, np.zeros(100000, np.uint8), "^plan: 80 columns can be split in 1 to 2; got 3 splits"),
        (0, np.zeros(100000, np.uint8), "^plan: .* got 0 splits"),
    ],
)
def test_splits_that_cannot_be_made_are_refused(num_splits, workspace, message):
    operands = np.zeros((4, 8), BFLOAT16), np.zeros((4, 80), BFLOAT16), np.zeros((8, 80), BFLOAT16)
    with pytest.raises(ValueError, match=message):
        linear(*operands, workspace=workspace, plan=LinearPlan(LINEAR_TILES[-1], num_splits))


def test_more_tiles_than_counters_are_refused():
    n = 32 * (COUNTERS_SIZE // 4) + 1
    operands = np.zeros((1, n), BFLOAT16), np.zeros((1, 128), BFLOAT16), np.zeros((n, 128), BFLOAT16)
    workspace = np.empty(COUNTERS_SIZE + 4 * 2 * 64 * 32 * 1025, np.uint8)
    with pytest.raises(ValueError, match=r"^plan: at most 1024 tiles can be split; got 1025"):
        linear(*operands, workspace=workspace, plan=LinearPlan(LINEAR_TILES[-1], 2))


# -- bits -----------------------------------------------------------------------------------------------------


def test_linear_gives_the_same_bits_in_every_tile_and_batch(runner, rng):
    x, weight, bias = operands(rng, 66, 70, 200, BFLOAT16, True)
    tiles = [LINEAR_TILES[0], LINEAR_TILES[2], LINEAR_TILES[4]]  # the ones that are built for bfloat16 anyway
    results = [run(runner, linear, x, weight, bias, BFLOAT16, tile) for tile in tiles]
    assert (results[0] == results[1]).all()
    assert (results[0] == results[2]).all()
    for row in (0, 65):
        alone = run(runner, linear, x[row : row + 1], weight, bias, BFLOAT16, LINEAR_TILES[4])
        assert (alone[0] == results[0][row]).all()


def test_linear_small_gives_the_same_bits_in_every_tile_and_batch(runner, rng):
    x, weight, bias = operands(rng, 16, 50, 1160, FLOAT16, True)
    wide, wider = LINEAR_SMALL_TILES[1], LINEAR_SMALL_TILES[3]
    assert (wide.token_tiles, wider.token_tiles) == (2, 2)
    together = run(runner, linear_small, x, weight, bias, FLOAT32, wide)
    assert (run(runner, linear_small, x, weight, bias, FLOAT32, wider) == together).all()
    for row in (0, 9, 15):
        one = x[row : row + 1]
        assert (run(runner, linear_small, one, weight, bias, FLOAT32, wide)[0] == together[row]).all()
    x, weight, bias = operands(rng, 16, 50, 1160, BFLOAT16, True)  # the tiles of 8 tokens are built for bfloat16
    results = [run(runner, linear_small, x[5:12], weight, bias, BFLOAT16, LINEAR_SMALL_TILES[i]) for i in (0, 2)]
    assert (results[0] == results[1]).all()


@pytest.mark.parametrize(("operation", "tile"), [(linear, LINEAR_TILES[-1]), (linear_small, LINEAR_SMALL_TILES[0])])
def test_nan_and_infinity_stay_in_their_row_and_column(runner, rng, operation, tile):
    x, weight, bias = operands(rng, 7, 37, 72, BFLOAT16, True)
    x[3, 71] = np.nan
    weight[20, 0] = np.inf
    out = run(runner, operation, x, weight, bias, BFLOAT16, tile).astype(np.float64)
    assert_only_theirs(out, row=3, column=20)


@pytest.mark.parametrize(("operation", "tile"), [(linear, LINEAR_TILES[-1]), (linear_small, LINEAR_SMALL_TILES[0])])
def test_what_lies_around_the_operands_has_no_influence(runner, rng, operation, tile):
    x, weight, bias = operands(rng, 7, 37, 72, BFLOAT16, True)
    around = [guarded(runner, values)[0] for values in (x, weight, bias)]
    out = runner.array(poisoned((7, 37), BFLOAT16))
    operation(out, *around, **chosen(tile))
    assert np.array_equal(runner.host(out), run(runner, operation, x, weight, bias, BFLOAT16, tile))


@pytest.mark.parametrize("operation", [linear, linear_small])
@pytest.mark.parametrize(("m", "n"), [(0, 5), (5, 0)])
def test_empty_operands_launch_nothing(operation, m, n):
    out = np.full((m, n), np.nan, BFLOAT16)
    operation(out, np.zeros((m, 16), BFLOAT16), np.zeros((n, 16), BFLOAT16))  # no tile, no device: no launch


@pytest.mark.parametrize("operation", [linear_silu_and_mul, linear_small_silu_and_mul])
@pytest.mark.parametrize(("m", "n"), [(0, 5), (5, 0)])
def test_empty_operands_of_silu_and_mul_launch_nothing(operation, m, n):
    operation(np.full((m, n), np.nan, BFLOAT16), np.zeros((m, 16), BFLOAT16), np.zeros((2 * n, 16), BFLOAT16))


def good_operands():
    return {
        "out": np.zeros((4, 8), BFLOAT16),
        "x": np.zeros((4, 16), BFLOAT16),
        "weight": np.zeros((8, 16), BFLOAT16),
        "bias": np.zeros(8, BFLOAT16),
    }


def misaligned(shape) -> np.ndarray:
    return np.zeros(int(np.prod(shape)) + 16, BFLOAT16)[1:][: int(np.prod(shape))].reshape(shape)


@pytest.mark.parametrize("operation", [linear, linear_small])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((4, 16), FLOAT32)}, "x: dtype must be bfloat16 or float16"),
        ({"x": np.zeros(16, BFLOAT16)}, "x: expected shape"),
        ({"x": np.zeros((16, 4), BFLOAT16).T}, "x: .*C-contiguous"),
        ({"weight": np.zeros((8, 24), BFLOAT16)}, r"weight: expected shape \(any, 16\)"),
        ({"weight": np.zeros((8, 16), FLOAT16)}, "weight: expected .* bfloat16"),
        ({"bias": np.zeros(7, BFLOAT16)}, r"bias: expected shape \(8\)"),
        ({"bias": np.zeros(8, FLOAT32)}, "bias: expected .* bfloat16"),
        ({"out": np.zeros((4, 9), BFLOAT16)}, r"out: expected shape \(4, 8\)"),
        ({"out": np.zeros((4, 8), FLOAT16)}, "out: dtype must be bfloat16 or float32"),
        (
            {"x": np.zeros((4, 12), BFLOAT16), "weight": np.zeros((8, 12), BFLOAT16)},
            "x: .*multiple of 16 bytes",
        ),
        ({"x": np.zeros((4, 0), BFLOAT16), "weight": np.zeros((8, 0), BFLOAT16)}, "x: rows must not be empty"),
        ({"x": misaligned((4, 16))}, "x: must start at a multiple of 16 bytes"),
        ({"weight": misaligned((8, 16))}, "weight: must start at a multiple of 16 bytes"),
        ({"out": misaligned((4, 8))}, "out: must start at a multiple of 16 bytes"),
    ],
)
def test_bad_operands_are_named(operation, changes, message):
    with pytest.raises(ValueError, match=message):
        operation(**{**good_operands(), **changes})


@pytest.mark.parametrize("operation", [linear, linear_small])
def test_only_float32_is_added_to(operation):
    with pytest.raises(ValueError, match="out: dtype must be float32; got bfloat16"):
        operation(**good_operands(), accumulate=True)


@pytest.mark.parametrize("operation", [linear_silu_and_mul, linear_small_silu_and_mul])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": np.zeros((4, 8), FLOAT32)}, "out: dtype must be bfloat16; got float32"),
        ({"out": np.zeros((4, 16), BFLOAT16)}, r"out: expected shape \(4, 8\)"),
        ({"out": misaligned((4, 8))}, "out: must start at a multiple of 16 bytes"),
        ({"weight": np.zeros((15, 16), BFLOAT16)}, "weight: rows must be pairs of gate and up; got 15"),
    ],
)
def test_bad_operands_of_silu_and_mul_are_named(operation, changes, message):
    good = {name: np.zeros(shape, BFLOAT16) for name, shape in (("out", (4, 8)), ("x", (4, 16)), ("weight", (16, 16)))}
    with pytest.raises(ValueError, match=message):
        operation(**(good | changes))


def test_linear_small_refuses_more_rows_than_it_can_hold():
    x, weight = np.zeros((17, 16), BFLOAT16), np.zeros((8, 16), BFLOAT16)
    with pytest.raises(ValueError, match="x: linear_small takes at most 16 rows; got 17, use linear"):
        linear_small(np.zeros((17, 8), BFLOAT16), x, weight)
    with pytest.raises(ValueError, match="tile: 8 tokens are too few for the 9 rows of x"):
        linear_small(np.zeros((9, 8), BFLOAT16), x[:9], weight, tile=LINEAR_SMALL_TILES[0])


# -- the choice of tiles ------------------------------------------------------------------------------------


DEVICES = pytest.mark.parametrize("device", [H100, A100, RTX_5090], ids=lambda device: device.arch)


@DEVICES
def test_chosen_tiles_fit_the_device_and_are_shipped(device):
    names = {name for _, name in linear_module.instantiations()}
    small_names = {name for _, name in linear_small_module.instantiations()}
    for n in SIZES:
        for m in (1, 16, 17, 63, 64, 65, 128, 500, 4096, 100_000):
            tile, _ = linear_plan(m, n, 4096, device)
            assert tile.shared_bytes <= device.max_shared_bytes
            sizes = (tile.tile_m, tile.tile_n, tile.warps_m, tile.warps_n, tile.stages)
            assert f"linear<__half, float, {', '.join(map(str, sizes))}>" in names
        for m in range(1, MAX_ROWS + 1):
            tile = linear_small_tile(m, n, device)
            assert max(tile.shared_bytes, tile.normed_shared_bytes) <= device.max_shared_bytes
            assert tile.token_tiles == ceil_div(m, 8)
            sizes = f"{tile.row_tiles}, {tile.token_tiles}, {tile.stages}"
            assert f"linear_small<__half, __half, __half, {sizes}>" in small_names
            if m <= MAX_NORMED_ROWS:
                assert f"linear_small<__nv_bfloat16, __nv_bfloat16, float, {sizes}>" in small_names


@DEVICES
def test_splits_depend_on_the_weight_alone_and_fit_the_workspace(device):
    for n in SIZES:
        for k in (8, 64, 576, 1536, 4096, 14336):
            plan = linear_plan(1, n, k, device)
            assert {linear_plan(m, n, k, device) for m in (17, 32, 63, SPLIT_ROWS)} == {plan}
            tile, num_splits = plan
            assert 1 <= num_splits <= ceil_div(k, 64)
            assert linear_plan(SPLIT_ROWS + 1, n, k, device).num_splits == 1
            if num_splits > 1:
                num_tiles = ceil_div(n, tile.tile_n)
                assert num_tiles * num_splits * tile.tile_m * tile.tile_n <= max_partial_floats(device)
                assert 4 * num_tiles <= COUNTERS_SIZE
    assert linear_workspace_size(device) < 12e6


@DEVICES
@pytest.mark.parametrize(
    ("n", "k"), [(6144, 4096), (4096, 4096), (4096, 14336), (2048, 2048), (3072, 2048), (2048, 8192)]
)
def test_weights_of_small_steps_are_read_by_most_sms(device, n, k):
    """Where tiles alone would leave half of them or more idle."""
    tile, num_splits = linear_plan(32, n, k, device)
    assert num_splits > 1
    assert ceil_div(n, tile.tile_n) < 0.6 * device.num_sms
    num_blocks = ceil_div(n, tile.tile_n) * num_splits
    assert 0.7 * device.num_sms <= num_blocks <= 2 * device.num_sms


@pytest.mark.parametrize(
    ("m", "n", "k", "device", "expected"),
    [
        (4096, 28672, 4096, H100, (128, 256, 1)),  # plenty of work: the tile that draws the least from L2
        (4096, 28672, 4096, RTX_5090, (128, 128, 1)),  # 144 KB don't fit there
        (128, 4096, 4096, H100, (64, 64, 1)),  # 128 tiles on 132 SMs, where 128 x 128 would leave 100 of them idle
        (64, 28672, 4096, H100, (64, 128, 1)),  # no tile of 128 tokens for 64, and enough of this one
        (32, 4096, 4096, H100, (64, 64, 2)),  # 128 thread blocks
        (32, 4096, 14336, H100, (64, 128, 4)),  # again, with less of x to draw: a long k outweighs merging four splits
        (32, 576, 576, H100, (64, 32, 1)),  # so little to read that merging would take longer
    ],
)
def test_plan_for_shape(m, n, k, device, expected):
    tile, num_splits = linear_plan(m, n, k, device)
    assert (tile.tile_m, tile.tile_n, num_splits) == expected


def test_small_tile_takes_two_row_tiles_where_every_sm_still_has_two_blocks():
    assert linear_small_tile(1, 4096, H100).row_tiles == 1
    assert linear_small_tile(1, 2 * 132 * 32, H100).row_tiles == 2
    assert linear_small_tile(1, 128256, H100) == LinearSmallTile(row_tiles=2, token_tiles=1, stages=2)
