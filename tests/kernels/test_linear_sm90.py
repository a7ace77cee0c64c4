"""linear_sm90.cu against the formula in float64, and the choice of its tiles."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
from linear_tools import (
    H100,
    SIZES,
    assert_gated_matches_formula,
    assert_matches_formula,
    assert_only_theirs,
    gate_and_up,
    gated,
    operands,
    residual,
    run,
)

from cupaged.kernels import linear_sm90 as linear_sm90_module
from cupaged.kernels.checks import BFLOAT16, FLOAT16, FLOAT32, ceil_div
from cupaged.kernels.linear_sm90 import linear_sm90, linear_sm90_silu_and_mul
from cupaged.kernels.tuning import LINEAR_SM90_PLANS, SPLIT_CLASSES_SM90, linear_sm90_plan

pytestmark = pytest.mark.sm90

WIDE, MIDDLE, NARROW, SPLIT = LINEAR_SM90_PLANS


def plan_id(plan) -> str:
    return f"{plan.tile.tile_n}x{plan.num_splits}"


# m, n, k, thread blocks. Sizes around the tiles' edges; k from one chunk of 8 to more stages than the ring has; thread
# blocks with one tile and with several, whose steps go round the ring in the middle of a tile.
CASES = [
    (1, 1, 8, 1),
    (128, 256, 64, 1),
    (65, 255, 136, 2),
    (129, 257, 72, 1),
    (64, 193, 64 * 5, 1),  # half of the multiplying warps have nothing to do
    (144, 129, 64 * 5, 1),  # a tile that m cuts off at a multiple of what is fetched at a time
    (130, 300, 64 * 7 + 8, 3),
    (8 * 128 + 1, 40, 16, 2),  # more than a group of the raster, with a ragged last one
]


@pytest.mark.parametrize("plan", [WIDE, MIDDLE, NARROW], ids=plan_id)
@pytest.mark.parametrize(("m", "n", "k", "num_blocks"), CASES)
def test_matches_the_formula(runner, rng, m, n, k, num_blocks, plan):
    narrow = plan is NARROW
    dtype, out_dtype, with_bias = (FLOAT16, FLOAT32, False) if narrow else (BFLOAT16, BFLOAT16, True)
    x, weight, bias = operands(rng, m, n, k, dtype, with_bias)
    operation = partial(linear_sm90, num_blocks=num_blocks)
    assert_matches_formula(run(runner, operation, x, weight, bias, out_dtype, plan), x, weight, bias)


# On a GPU the two thread blocks of a cluster multiply a split each. The host has no clusters: one multiplies all, and
# exchanges sums with itself.
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 72), (129, 257, 264), (200, 136, 64 * 29 + 8)])
def test_splits_match_the_formula(runner, rng, m, n, k):
    x, weight, bias = operands(rng, m, n, k, BFLOAT16, True)
    assert_matches_formula(run(runner, linear_sm90, x, weight, bias, BFLOAT16, SPLIT), x, weight, bias)
    added_to = residual(rng, m, n)
    out = run(runner, linear_sm90, x, weight, bias, FLOAT32, SPLIT, added_to)
    assert_matches_formula(out, x, weight, bias, added_to)


@pytest.mark.parametrize(("dtype", "plan"), [(BFLOAT16, WIDE), (FLOAT16, NARROW)], ids=["wide", "narrow"])
def test_products_are_added_to_what_out_holds(runner, rng, dtype, plan):
    operation = partial(linear_sm90, num_blocks=2)
    for m, n, k in ((130, 300, 200), (70, 131, 72)):  # the last one's rows don't start at multiples of 16 bytes
        x, weight, bias = operands(rng, m, n, k, dtype, True)
        added_to = residual(rng, m, n)
        out = run(runner, operation, x, weight, bias, FLOAT32, plan, added_to)
        assert_matches_formula(out, x, weight, bias, added_to)
        assert np.array_equal(out, added_to + run(runner, operation, x, weight, bias, FLOAT32, plan))


@pytest.mark.parametrize(
    ("dtype", "plan"), [(BFLOAT16, NARROW), (FLOAT16, WIDE), (BFLOAT16, SPLIT)], ids=["narrow", "wide", "split"]
)
@pytest.mark.parametrize(("m", "n", "k"), [(128, 128, 128), (127, 136, 520), (70, 127, 72), (1, 1, 72)])
def test_silu_and_mul_of_products_match_the_formula(runner, rng, m, n, k, dtype, plan):
    x, gate, up = gate_and_up(rng, m, n, k, dtype)
    out = gated(runner, partial(linear_sm90_silu_and_mul, num_blocks=2), x, gate, up, plan)
    assert_gated_matches_formula(out, x, gate, up)


def test_the_same_bits_in_every_tile_and_batch(runner, rng):
    x, weight, bias = operands(rng, 140, 270, 200, BFLOAT16, True)
    together = run(runner, partial(linear_sm90, num_blocks=1), x, weight, bias, BFLOAT16, WIDE)
    for plan in (MIDDLE, NARROW):
        assert (run(runner, partial(linear_sm90, num_blocks=3), x, weight, bias, BFLOAT16, plan) == together).all()
    for row in (0, 64, 139):
        alone = run(runner, partial(linear_sm90, num_blocks=4), x[row : row + 1], weight, bias, BFLOAT16, NARROW)
        assert (alone[0] == together[row]).all()


def test_the_same_bits_of_splits_in_every_batch(runner, rng):
    x, weight, bias = operands(rng, 140, 200, 328, BFLOAT16, True)
    together = run(runner, linear_sm90, x, weight, bias, FLOAT32, SPLIT)
    for row in (0, 139):
        alone = run(runner, linear_sm90, x[row : row + 1], weight, bias, FLOAT32, SPLIT)
        assert (alone[0] == together[row]).all()


def test_nan_and_infinity_stay_in_their_row_and_column(runner, rng):
    x, weight, bias = operands(rng, 70, 140, 72, BFLOAT16, True)
    x[3, 71] = np.nan
    weight[20, 0] = np.inf
    out = run(runner, partial(linear_sm90, num_blocks=1), x, weight, bias, BFLOAT16, WIDE).astype(np.float64)
    assert_only_theirs(out, row=3, column=20)


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


def test_more_splits_than_steps_are_refused():
    out, x, weight = (np.zeros(shape, BFLOAT16) for shape in ((4, 8), (4, 64), (8, 64)))
    with pytest.raises(ValueError, match="64 columns can be split in 1 to 1; got 2 splits"):
        linear_sm90(out, x, weight, plan=SPLIT)


# -- the choice of the plan ----------------------------------------------------------------------------------


def test_chosen_plans_fit_the_device_and_are_shipped():
    names = {name for _, name in linear_sm90_module.instantiations()}
    assert len(names) == 2 * 2 * len(LINEAR_SM90_PLANS)
    for n in SIZES:
        for m in (65, 128, 129, 256, 500, 4096, 100_000):
            for k in (8, 576, 4096, 14336):
                tile, num_splits = linear_sm90_plan(m, n, k, H100)
                assert tile.shared_bytes <= H100.max_shared_bytes
                assert f"linear_sm90<__half, float, {tile.tile_n}, {tile.stages}, {num_splits}>" in names
                num_tiles = ceil_div(m, 128) * ceil_div(n, tile.tile_n)
                assert num_splits == 1 or (num_tiles * num_splits <= H100.num_sms and num_splits <= ceil_div(k, 64))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("k", [64, 576, 2048, 14336])
def test_splits_are_the_same_in_a_class_of_batches(n, k):
    edges = [0, *SPLIT_CLASSES_SM90, 2000]
    for low, high in itertools.pairwise(edges):
        assert len({linear_sm90_plan(m, n, k, H100).num_splits for m in range(low + 1, high + 1)}) == 1
    assert linear_sm90_plan(SPLIT_CLASSES_SM90[-1] + 1, n, k, H100).num_splits == 1


@pytest.mark.parametrize(
    ("m", "n", "k", "width", "num_splits"),
    [
        (4096, 28672, 4096, 256, 1),  # plenty of work: the tile that draws the least from L2
        (512, 6144, 4096, 192, 1),  # 128 tiles, which all SMs have place for at once
        (512, 4096, 4096, 128, 1),  # 128 tiles
        (256, 4096, 14336, 128, 2),  # 64 tiles, 128 thread blocks
        (129, 4096, 14336, 128, 2),
        (256, 2048, 2048, 128, 2),
        (257, 4096, 14336, 128, 1),  # of 512 rows there would be too many thread blocks
    ],
)
def test_plan_for_shape(m, n, k, width, num_splits):
    tile, splits = linear_sm90_plan(m, n, k, H100)
    assert (tile.tile_n, splits) == (width, num_splits)
