"""linear_few_sm90.cu against the formula in float64, and the choice of its tiles.

Splits are clusters, which the host build doesn't have: there the thread blocks of one multiply all of k each, and share
out the rows that they store. The sums of splits run on a GPU only.
"""

from __future__ import annotations

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
    guarded,
    operands,
    residual,
    run,
)

from cupaged.kernels import linear_few_sm90 as linear_few_sm90_module
from cupaged.kernels.checks import BFLOAT16, FLOAT16, FLOAT32, HALF_TYPES, ceil_div
from cupaged.kernels.device import DeviceInfo
from cupaged.kernels.linear_few_sm90 import linear_few_sm90, linear_few_sm90_silu_and_mul
from cupaged.kernels.tuning import (
    LINEAR_FEW_ROWS,
    LINEAR_FEW_SPLITS,
    LINEAR_FEW_TILES,
    LinearFewTile,
    linear_few_is_quickest,
    linear_few_max_rows,
    linear_few_splits,
    linear_few_tile,
)
from kernel_tools import poisoned

pytestmark = pytest.mark.sm90


@pytest.fixture(autouse=True)
def on_an_h100(monkeypatch):
    """So many thread blocks have room, on the host too."""
    monkeypatch.setattr(linear_few_sm90_module, "device_info", lambda: H100)


def tile_id(tile: LinearFewTile) -> str:
    return f"{tile.tokens}x{tile.stages}-by-{tile.splits}"


def cases():
    """Tokens and rows of weight around the tile's edges; k from one chunk of 8, where some splits have no step, to more
    steps than the ring has. The types take turns, so that each kernel is built for few of them."""
    for i, tile in enumerate(LINEAR_FEW_TILES):
        dtype, out_dtype = [(BFLOAT16, BFLOAT16), (FLOAT16, FLOAT32)][i % 2]
        for m, n, k, with_bias in (
            (1, 1, 8, True),
            (tile.tokens, LINEAR_FEW_ROWS, 64 * tile.splits, False),
            (tile.tokens - 1, LINEAR_FEW_ROWS + 1, 328, True),
            (tile.tokens // 2 + 1, 2 * LINEAR_FEW_ROWS - 8, 64 * (tile.stages + 3) * tile.splits + 24, False),
        ):
            yield pytest.param(m, n, k, dtype, out_dtype, with_bias, tile, id=f"{tile_id(tile)}-{m}x{n}x{k}")


SMALLEST, HALVED, LARGEST = LinearFewTile(8, 12, 1), LinearFewTile(16, 10, 2), LinearFewTile(64, 6, 1)
UNSPLIT = [tile for tile in LINEAR_FEW_TILES if tile.splits == 1]


@pytest.mark.parametrize(("m", "n", "k", "dtype", "out_dtype", "with_bias", "tile"), list(cases()))
def test_matches_the_formula(runner, rng, m, n, k, dtype, out_dtype, with_bias, tile):
    x, weight, bias = operands(rng, m, n, k, dtype, with_bias)
    assert_matches_formula(run(runner, linear_few_sm90, x, weight, bias, out_dtype, tile), x, weight, bias)


@pytest.mark.parametrize("tile", [SMALLEST, HALVED, LARGEST], ids=tile_id)
@pytest.mark.parametrize(("m", "n", "k"), [(5, 100, 200), (8, 131, 456)])  # rows of whole 16 bytes and of less
def test_products_are_added_to_what_out_holds(runner, rng, m, n, k, tile):
    x, weight, bias = operands(rng, m, n, k, FLOAT16, True)
    added_to = residual(rng, m, n)
    out = run(runner, linear_few_sm90, x, weight, bias, FLOAT32, tile, added_to)
    assert_matches_formula(out, x, weight, bias, added_to)
    assert np.array_equal(out, added_to + run(runner, linear_few_sm90, x, weight, bias, FLOAT32, tile))


@pytest.mark.parametrize("tile", LINEAR_FEW_TILES, ids=tile_id)
def test_silu_and_mul_of_products_match_the_formula(runner, rng, tile):
    for m, n, k in (
        (tile.tokens, LINEAR_FEW_ROWS // 2, 64),
        (tile.tokens - 1, LINEAR_FEW_ROWS // 2 + 8, 520),
        (1, 31, 72),
    ):
        x, gate, up = gate_and_up(rng, m, n, k, HALF_TYPES[tile.splits % 2])
        assert_gated_matches_formula(gated(runner, linear_few_sm90_silu_and_mul, x, gate, up, tile), x, gate, up)


@pytest.mark.parametrize("k", [64, 200, 456])  # the first stages hold several tiles, the ring turns within one
@pytest.mark.parametrize("tile", UNSPLIT, ids=tile_id)
def test_a_thread_block_computes_one_tile_after_the_other(runner, rng, k, tile):
    """Five tiles, of which the last one is cut off: all in one thread block, and two and three of them in two."""
    m, n = tile.tokens - 1, 4 * LINEAR_FEW_ROWS + 9
    x, weight, bias = operands(rng, m, n, k, FLOAT16, True)
    added_to = residual(rng, m, n)
    alone = run(runner, linear_few_sm90, x, weight, bias, FLOAT32, tile, added_to)
    assert_matches_formula(alone, x, weight, bias, added_to)
    for num_blocks in (1, 2):
        operation = partial(linear_few_sm90, num_blocks=num_blocks)
        assert np.array_equal(run(runner, operation, x, weight, bias, FLOAT32, tile, added_to), alone)
        out = run(runner, operation, x, weight, bias, FLOAT16, tile)
        assert_matches_formula(out, x, weight, bias)


@pytest.mark.parametrize("tile", UNSPLIT, ids=tile_id)
def test_a_thread_block_gates_one_tile_after_the_other(runner, rng, tile):
    for m, n, k in ((tile.tokens, 2 * LINEAR_FEW_ROWS - 8, 328), (1, LINEAR_FEW_ROWS + 3, 72)):
        x, gate, up = gate_and_up(rng, m, n, k, BFLOAT16)
        out = gated(runner, partial(linear_few_sm90_silu_and_mul, num_blocks=2), x, gate, up, tile)
        assert_gated_matches_formula(out, x, gate, up)


@pytest.mark.parametrize("splits", LINEAR_FEW_SPLITS)
def test_the_same_bits_in_every_batch_and_tile(runner, rng, splits):
    tiles = [tile for tile in LINEAR_FEW_TILES if tile.splits == splits]
    x, weight, bias = operands(rng, tiles[-1].tokens, 200, 64 * 9 + 8, BFLOAT16, True)
    together = run(runner, linear_few_sm90, x, weight, bias, BFLOAT16, tiles[-1])
    for tile in tiles:
        for rows in (slice(1), slice(63, 64), slice(3, 3 + tile.tokens)):
            alone = run(runner, linear_few_sm90, x[rows], weight, bias, BFLOAT16, tile)
            assert np.array_equal(alone, together[rows])


@pytest.mark.parametrize("tile", [SMALLEST, HALVED], ids=tile_id)
def test_nan_and_infinity_stay_in_their_row_and_column(runner, rng, tile):
    x, weight, bias = operands(rng, 7, 140, 72, BFLOAT16, True)
    x[3, 71] = np.nan
    weight[20, 0] = np.inf
    out = run(runner, linear_few_sm90, x, weight, bias, BFLOAT16, tile).astype(np.float64)
    assert_only_theirs(out, row=3, column=20)


@pytest.mark.parametrize("tile", [SMALLEST, HALVED], ids=tile_id)
def test_what_lies_around_the_operands_has_no_influence(runner, rng, tile):
    x, weight, bias = operands(rng, 7, 37, 72, BFLOAT16, True)
    around = [guarded(runner, values)[0] for values in (x, weight, bias)]
    out = runner.array(poisoned((7, 37), BFLOAT16))
    linear_few_sm90(out, *around, tile=tile)
    assert np.array_equal(runner.host(out), run(runner, linear_few_sm90, x, weight, bias, BFLOAT16, tile))


@pytest.mark.parametrize(("m", "n"), [(0, 5), (5, 0)])
def test_empty_operands_launch_nothing(m, n):
    linear_few_sm90(np.full((m, n), np.nan, BFLOAT16), np.zeros((m, 16), BFLOAT16), np.zeros((n, 16), BFLOAT16))


def test_bad_operands_are_named():
    out, x, weight = (np.zeros(shape, BFLOAT16) for shape in ((4, 8), (4, 16), (8, 16)))
    with pytest.raises(ValueError, match="x: dtype must be bfloat16 or float16"):
        linear_few_sm90(out, x.astype(FLOAT32), weight)
    with pytest.raises(ValueError, match="out: dtype must be float32; got bfloat16"):
        linear_few_sm90(out, x, weight, accumulate=True)
    with pytest.raises(ValueError, match=r"out: expected shape \(4, 4\)"):
        linear_few_sm90_silu_and_mul(out, x, weight)
    with pytest.raises(ValueError, match="x: linear_few_sm90 takes at most 64 rows with this weight; got 65, use"):
        linear_few_sm90(np.zeros((65, 8), BFLOAT16), np.zeros((65, 16), BFLOAT16), weight)
    with pytest.raises(ValueError, match="tile: 8 tokens are too few for the 9 rows of x"):
        linear_few_sm90(np.zeros((9, 8), BFLOAT16), np.zeros((9, 16), BFLOAT16), weight, tile=SMALLEST)


def test_two_thread_blocks_fit_an_sm_and_all_are_shipped():
    names = {name for _, name in linear_few_sm90_module.instantiations()}
    assert len(names) == 2 * 2 * len(LINEAR_FEW_TILES)
    for tile in LINEAR_FEW_TILES:
        assert 2 * (tile.shared_bytes + 1024) <= H100.max_shared_bytes + 1024  # CUDA takes 1,024 bytes of each
        assert f"linear_few_sm90<__half, float, {tile.tokens}, {tile.stages}, {tile.splits}>" in names


def test_where_k_is_split_all_thread_blocks_have_room_at_once():
    for num_sms in (78, 114, 132):
        device = DeviceInfo("sm_90a", num_sms, H100.max_shared_bytes)
        for n in range(1, 64 * num_sms, 64):
            for k in (768, 4096):
                splits = linear_few_splits(n, k, device)
                tiles = [tile for tile in LINEAR_FEW_TILES if tile.splits == splits > 1]
                assert all(splits * ceil_div(n, LINEAR_FEW_ROWS) <= tile.blocks_at_once(device) for tile in tiles)


def test_chosen_tiles_hold_the_tokens_and_split_by_the_weight_alone():
    for n in SIZES:
        for k in (8, 64, 576, 1536, 4096, 14336):
            splits = linear_few_splits(n, k, H100)
            assert splits == 1 or ceil_div(k, 64) >= 6 * splits
            assert splits == 1 or ceil_div(n, 64) * splits / 2 < 0.9 * H100.num_sms
            assert linear_few_max_rows(n, k, H100) == (128 if splits == 4 else 64)
            for m in range(1, linear_few_max_rows(n, k, H100) + 1):
                tile = linear_few_tile(m, n, k, H100)
                assert tile.splits == splits
                assert m <= tile.tokens < max(2 * m, 9)


@pytest.mark.parametrize(
    ("n", "k", "splits"),
    [
        (4096, 4096, 2),  # 64 tiles: 128 thread blocks
        (6144, 4096, 2),  # 96 tiles are too few, and twice as many have room side by side
        (28672, 4096, 1),
        (2048, 8192, 4),
        (960, 576, 1),  # 9 steps: too few to be split
    ],
)
def test_splits_for_shape(n, k, splits):
    assert linear_few_splits(n, k, H100) == splits


@pytest.mark.parametrize(
    ("n", "k", "rows"),  # the first and the last number of rows
    [
        (4096, 4096, (1, 64)),
        (4096, 14336, (1, 64)),
        (128256, 4096, (1, 64)),
        (2048, 8192, (1, 128)),
        (3072, 2048, (9, 128)),
        (960, 576, (17, 64)),
    ],
)
def test_which_kernel_is_quickest(n, k, rows):
    found = [m for m in range(1, 300) if linear_few_is_quickest(m, n, k, H100)]
    assert (found[0], found[-1]) == rows
    assert len(found) == rows[1] - rows[0] + 1
