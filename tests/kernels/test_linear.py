"""linear.cu and linear_small.cu against the formula in float64, and the choice of their tiles."""

from __future__ import annotations

import numpy as np
import pytest

from cupaged.kernels import linear as linear_module
from cupaged.kernels import linear_small as linear_small_module
from cupaged.kernels.checks import BFLOAT16, FLOAT16, FLOAT32, HALF_TYPES, ceil_div
from cupaged.kernels.device import DeviceInfo
from cupaged.kernels.linear import linear, linear_silu_and_mul
from cupaged.kernels.linear_small import MAX_ROWS, linear_small, linear_small_silu_and_mul
from cupaged.kernels.tuning import (
    LINEAR_SMALL_TILES,
    LINEAR_TILES,
    LinearSmallTile,
    LinearTile,
    linear_small_tile,
    linear_tile,
)
from kernel_tools import SMALLEST_SUBNORMAL, UNIT_ROUNDOFF, assert_close, is_poison, poisoned

H100 = DeviceInfo("sm_90a", num_sms=132, max_shared_bytes=232448)
A100 = DeviceInfo("sm_80", num_sms=108, max_shared_bytes=166912)
RTX_5090 = DeviceInfo("sm_120", num_sms=170, max_shared_bytes=101376)

GUARD = 8  # rows around an operand


def operands(rng, m: int, n: int, k: int, dtype, with_bias: bool):
    """x, weight and bias or None, rounded to dtype, with a few outliers."""
    x = rng.standard_normal((m, k)).astype(np.float32)
    weight = rng.standard_normal((n, k)).astype(np.float32)
    x[0, 0] = x[-1, -1] = 50  # in the first and the last place, so that a lost edge shows
    weight[0, -1] = weight[-1, 0] = -20
    bias = rng.standard_normal(n).astype(dtype) if with_bias else None
    return x.astype(dtype), weight.astype(dtype), bias


def guarded(runner, values: np.ndarray):
    """(the values as a view of a larger array, that array): NaN stands in the GUARD rows before and after them."""
    buffer = poisoned((len(values) + 2 * GUARD, *values.shape[1:]), values.dtype)
    buffer[GUARD : GUARD + len(values)] = values
    buffer = runner.array(buffer)
    return buffer[GUARD : GUARD + len(values)], buffer


def run(runner, operation, x, weight, bias, out_dtype, tile, added_to: np.ndarray | None = None) -> np.ndarray:
    """The operation's out, before it all NaN or what is added to. What lies around it must not be written."""
    accumulate = added_to is not None
    out, buffer = guarded(runner, added_to if accumulate else poisoned((len(x), len(weight)), out_dtype))
    bias = None if bias is None else guarded(runner, bias)[0]
    operation(out, runner.array(x), runner.array(weight), bias, accumulate=accumulate, tile=tile)
    buffer = runner.host(buffer)
    assert is_poison(buffer[:GUARD]).all()
    assert is_poison(buffer[GUARD + len(x) :]).all()
    return buffer[GUARD : GUARD + len(x)]


def residual(rng, m: int, n: int) -> np.ndarray:
    """What is added to. Larger than the products, with outliers in the first and the last place."""
    values = 30 * rng.standard_normal((m, n), np.float32)
    values[0, 0], values[-1, -1] = 3000, -5000
    return values


def assert_matches_formula(out, x, weight, bias, added_to=None):
    """Judge by the roundings: one for each product summed, in float32 (truncated, as tensor cores do: a unit of
    2^-23), each at most that part of the sum of magnitudes; then one to the nearest of out's type."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    expected = x @ weight.T
    magnitude = np.abs(x) @ np.abs(weight).T
    if bias is not None:
        expected += bias.astype(np.float64)
        magnitude += np.abs(bias.astype(np.float64))
    if added_to is not None:
        expected += added_to.astype(np.float64)
        magnitude += np.abs(added_to.astype(np.float64))
    summing = (x.shape[1] + 2) * 2.0**-23 * magnitude
    tolerance = summing + UNIT_ROUNDOFF[out.dtype] * (np.abs(expected) + summing) + SMALLEST_SUBNORMAL[out.dtype]
    assert np.median(np.abs(expected)) > 20 * np.median(tolerance)  # or else anything would pass
    assert_close(out, expected, atol=tolerance)


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


def gated(runner, operation, x, gate, up, tile) -> np.ndarray:
    """The operation's out, NaN before it. What lies around it must not be written."""
    weight = np.stack([gate, up], axis=1).reshape(-1, gate.shape[1])
    out, buffer = guarded(runner, poisoned((len(x), len(gate)), x.dtype))
    operation(out, guarded(runner, x)[0], guarded(runner, weight)[0], tile=tile)
    buffer = runner.host(buffer)
    assert is_poison(buffer[:GUARD]).all()
    assert is_poison(buffer[GUARD + len(x) :]).all()
    return buffer[GUARD : GUARD + len(x)]


def gate_and_up(rng, m: int, n: int, k: int, dtype):
    """x, gate and up, with outliers."""
    x, up, _ = operands(rng, m, n, k, dtype, False)
    gate = (rng.standard_normal((n, k)) / np.sqrt(k)).astype(dtype)  # where silu is neither 0 nor the gate itself
    gate[0, 0] = gate[-1, -1] = 0.125  # with the 50 in x an outlier, and no product beyond float16
    return x, gate, up


def silu(gate: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate))


@pytest.mark.parametrize(("operation", "m", "n", "k", "dtype", "tile"), list(gated_cases()))
def test_silu_and_mul_of_products_match_the_formula(runner, rng, operation, m, n, k, dtype, tile):
    x, gate, up = gate_and_up(rng, m, n, k, dtype)
    assert_gated_matches_formula(gated(runner, operation, x, gate, up, tile), x, gate, up)


def assert_gated_matches_formula(out, x, gate, up):
    """Each sum errs as in assert_matches_formula; silu's slope is 1.1 at most. Then four roundings in float32, of which
    expf's may be two units, and one to out's type."""
    dtype, k = out.dtype, x.shape[1]
    x, gate, up = (values.astype(np.float64) for values in (x, gate, up))
    g, u = x @ gate.T, x @ up.T
    g_error, u_error = ((k + 1) * 2.0**-23 * (np.abs(x) @ np.abs(matrix).T) for matrix in (gate, up))
    expected = silu(g) * u
    summing = 1.1 * g_error * (np.abs(u) + u_error) + np.abs(silu(g)) * u_error
    rounding = (UNIT_ROUNDOFF[dtype] + 6 * 2.0**-24) * (np.abs(expected) + summing)
    tolerance = summing + rounding + SMALLEST_SUBNORMAL[dtype] + 3e-37 * np.abs(u)
    assert np.median(np.abs(expected)) > 20 * np.median(tolerance)
    assert_close(out, expected, atol=tolerance)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize(
    ("operation", "tile"),
    [(linear_silu_and_mul, LINEAR_TILES[-1]), (linear_small_silu_and_mul, LINEAR_SMALL_TILES[0])],
)
def test_extreme_gates(runner, operation, tile, dtype):
    """Where exp(-gate) overflows float32, from gate = -88.7 on, silu becomes 0, off by at most 89 * exp(-88.7)."""
    largest = 65504 if dtype == FLOAT16 else 3e38
    gates = np.array([0, -0.0, largest, -largest, -87, -88, -89, -104, 1e-7, -1e-7, 100, -17, 17, np.inf, np.nan, 1])
    gates, ups = gates.astype(dtype), np.array([1] * 15 + [np.inf], dtype)
    x, gate, up = np.zeros((1, 8), dtype), np.zeros((16, 8), dtype), np.zeros((16, 8), dtype)
    x[0, 0], gate[:, 0], up[:, 0] = 1, gates, ups
    expected = silu(gates.astype(np.float64)) * ups.astype(np.float64)
    tolerance = {"rtol": UNIT_ROUNDOFF[dtype] + 6 * 2.0**-24, "atol": SMALLEST_SUBNORMAL[dtype] + 3e-37}
    assert_close(gated(runner, operation, x, gate, up, tile)[0], expected, **tolerance)


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
    assert np.isnan(out[3]).all()
    others = np.delete(out, 3, axis=0)
    assert (np.isinf(others[:, 20])).all()
    assert np.isfinite(np.delete(others, 20, axis=1)).all()


@pytest.mark.parametrize(("operation", "tile"), [(linear, LINEAR_TILES[-1]), (linear_small, LINEAR_SMALL_TILES[0])])
def test_what_lies_around_the_operands_has_no_influence(runner, rng, operation, tile):
    x, weight, bias = operands(rng, 7, 37, 72, BFLOAT16, True)
    around = [guarded(runner, values)[0] for values in (x, weight, bias)]
    out = runner.array(poisoned((7, 37), BFLOAT16))
    operation(out, *around, tile=tile)
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

SIZES = (1, 8, 576, 960, 2048, 4096, 6144, 28672, 32001, 49152, 151936)


@pytest.mark.parametrize("device", [H100, A100, RTX_5090], ids=lambda device: device.arch)
def test_chosen_tiles_fit_the_device_and_are_shipped(device):
    names = {name for _, name in linear_module.instantiations()}
    small_names = {name for _, name in linear_small_module.instantiations()}
    for n in SIZES:
        for m in (1, 16, 17, 63, 64, 65, 128, 500, 4096, 100_000):
            tile = linear_tile(m, n, device)
            assert tile.shared_bytes <= device.max_shared_bytes
            sizes = (tile.tile_m, tile.tile_n, tile.warps_m, tile.warps_n, tile.stages)
            assert f"linear<__half, float, {', '.join(map(str, sizes))}>" in names
        for m in range(1, MAX_ROWS + 1):
            tile = linear_small_tile(m, n, device)
            assert tile.shared_bytes <= device.max_shared_bytes
            assert tile.token_tiles == ceil_div(m, 8)
            assert f"linear_small<__half, __half, {tile.row_tiles}, {tile.token_tiles}, {tile.stages}>" in small_names


@pytest.mark.parametrize(
    ("m", "n", "device", "expected"),
    [
        (4096, 28672, H100, (128, 256)),  # plenty of work: the tile that draws the least from L2
        (4096, 28672, RTX_5090, (128, 128)),  # 144 KB don't fit there
        (32, 2048, H100, (64, 32)),  # few rows: 64 thread blocks are better than 16
        (128, 4096, H100, (64, 64)),  # 128 tiles on 132 SMs, where 128 x 128 would leave 100 of them idle
        (64, 28672, H100, (64, 128)),  # no tile of 128 tokens for 64
    ],
)
def test_tile_for_shape(m, n, device, expected):
    tile = linear_tile(m, n, device)
    assert (tile.tile_m, tile.tile_n) == expected


def test_small_tile_takes_two_row_tiles_where_every_sm_still_has_two_blocks():
    assert linear_small_tile(1, 4096, H100).row_tiles == 1
    assert linear_small_tile(1, 2 * 132 * 32, H100).row_tiles == 2
    assert linear_small_tile(1, 128256, H100) == LinearSmallTile(row_tiles=2, token_tiles=1, stages=2)
