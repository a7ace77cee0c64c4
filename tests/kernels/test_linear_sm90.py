"""linear_sm90.cu against the formula in float64, and the choice of its tiles."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from linear_tools import (
    H100,
    SIZES,
    assert_gated_matches_formula,
    assert_matches_formula,
    gate_and_up,
    gated,
    operands,
    residual,
    run,
)

from cupaged.kernels import linear_sm90 as linear_sm90_module
from cupaged.kernels.checks import BFLOAT16, FLOAT16, FLOAT32
from cupaged.kernels.linear_sm90 import linear_sm90, linear_sm90_silu_and_mul
from cupaged.kernels.tuning import LINEAR_SM90_TILES, linear_sm90_tile

pytestmark = pytest.mark.sm90

WIDE, NARROW = LINEAR_SM90_TILES

# m, n, k, thread blocks. Sizes around the tile's edges; k from one chunk of 8 to more stages than the ring has; thread
# blocks with one tile and with several, whose steps go round the ring in the middle of a tile.
CASES = [
    (1, 1, 8, 1),
    (128, 256, 64, 1),
    (65, 255, 136, 2),
    (129, 257, 72, 1),
    (130, 300, 64 * 7 + 8, 3),
    (8 * 128 + 1, 40, 16, 2),  # more than a group of the raster, with a ragged last one
]


@pytest.mark.parametrize("tile", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize(("m", "n", "k", "num_blocks"), CASES)
def test_matches_the_formula(runner, rng, m, n, k, num_blocks, tile):
    wide = tile is WIDE
    dtype, out_dtype, with_bias = (BFLOAT16, BFLOAT16, True) if wide else (FLOAT16, FLOAT32, False)
    x, weight, bias = operands(rng, m, n, k, dtype, with_bias)
    operation = partial(linear_sm90, num_blocks=num_blocks)
    assert_matches_formula(run(runner, operation, x, weight, bias, out_dtype, tile), x, weight, bias)


@pytest.mark.parametrize(("dtype", "tile"), [(BFLOAT16, WIDE), (FLOAT16, NARROW)], ids=["wide", "narrow"])
def test_products_are_added_to_what_out_holds(runner, rng, dtype, tile):
    operation = partial(linear_sm90, num_blocks=2)
    for m, n, k in ((130, 300, 200), (70, 131, 72)):  # the last one's rows don't start at multiples of 16 bytes
        x, weight, bias = operands(rng, m, n, k, dtype, True)
        added_to = residual(rng, m, n)
        out = run(runner, operation, x, weight, bias, FLOAT32, tile, added_to)
        assert_matches_formula(out, x, weight, bias, added_to)
        assert np.array_equal(out, added_to + run(runner, operation, x, weight, bias, FLOAT32, tile))


@pytest.mark.parametrize(("dtype", "tile"), [(BFLOAT16, NARROW), (FLOAT16, WIDE)], ids=["narrow", "wide"])
@pytest.mark.parametrize(("m", "n", "k"), [(128, 128, 64), (127, 136, 520), (70, 127, 72), (1, 1, 8)])
def test_silu_and_mul_of_products_match_the_formula(runner, rng, m, n, k, dtype, tile):
    x, gate, up = gate_and_up(rng, m, n, k, dtype)
    out = gated(runner, partial(linear_sm90_silu_and_mul, num_blocks=2), x, gate, up, tile)
    assert_gated_matches_formula(out, x, gate, up)


def test_the_same_bits_in_every_tile_and_batch(runner, rng):
    x, weight, bias = operands(rng, 140, 270, 200, BFLOAT16, True)
    together = run(runner, partial(linear_sm90, num_blocks=1), x, weight, bias, BFLOAT16, WIDE)
    assert (run(runner, partial(linear_sm90, num_blocks=3), x, weight, bias, BFLOAT16, NARROW) == together).all()
    for row in (0, 64, 139):
        alone = run(runner, partial(linear_sm90, num_blocks=4), x[row : row + 1], weight, bias, BFLOAT16, NARROW)
        assert (alone[0] == together[row]).all()


def test_nan_and_infinity_stay_in_their_row_and_column(runner, rng):
    x, weight, bias = operands(rng, 70, 140, 72, BFLOAT16, True)
    x[3, 71] = np.nan
    weight[20, 0] = np.inf
    out = run(runner, partial(linear_sm90, num_blocks=1), x, weight, bias, BFLOAT16, WIDE).astype(np.float64)
    assert np.isnan(out[3]).all()
    others = np.delete(out, 3, axis=0)
    assert (np.isinf(others[:, 20])).all()
    assert np.isfinite(np.delete(others, 20, axis=1)).all()


@pytest.mark.parametrize(("m", "n"), [(0, 5), (5, 0)])
def test_empty_operands_launch_nothing(m, n):
    linear_sm90(np.full((m, n), np.nan, BFLOAT16), np.zeros((m, 16), BFLOAT16), np.zeros((n, 16), BFLOAT16))


def test_bad_operands_are_named():
    out, x, weight = (np.zeros(shape, BFLOAT16) for shape in ((4, 8), (4, 16), (8, 16)))
    with pytest.raises(ValueError, match="x: dtype must be bfloat16 or float16"):
        linear_sm90(out, x.astype(FLOAT32), weight)
    with pytest.raises(ValueError, match="out: dtype must be float32; got bfloat16"):
        linear_sm90(out, x, weight, accumulate=True)
    with pytest.raises(ValueError, match=r"out: expected shape \(4, 4\)"):
        linear_sm90_silu_and_mul(out, x, weight)


def test_chosen_tiles_fit_the_device_and_are_shipped():
    names = {name for _, name in linear_sm90_module.instantiations()}
    assert len(names) == 2 * 2 * len(LINEAR_SM90_TILES)
    for n in SIZES:
        for m in (65, 128, 500, 4096, 100_000):
            tile = linear_sm90_tile(m, n, H100)
            assert tile.shared_bytes <= H100.max_shared_bytes
            assert f"linear_sm90<__half, float, {tile.tile_n}, {tile.stages}>" in names


@pytest.mark.parametrize(
    ("m", "n", "expected"),
    [
        (4096, 28672, WIDE),  # plenty of work: the tile that draws the least from L2
        (128, 4096, NARROW),  # 32 thread blocks are better than 16
        (512, 6144, WIDE),  # 96 tiles for 132 SMs; of 192 narrow ones some SMs would get two, which is no better
    ],
)
def test_tile_for_shape(m, n, expected):
    assert linear_sm90_tile(m, n, H100) == expected
