"""rms_norm.cu against the formula in float64."""

import numpy as np
import pytest

from cupaged.kernels.checks import BFLOAT16, FLOAT16, FLOAT32, HALF_TYPES
from cupaged.kernels.rms_norm import MAX_HIDDEN_SIZE, TILES, rms_norm
from kernel_tools import SMALLEST_SUBNORMAL, UNIT_ROUNDOFF, assert_close, poisoned

EPS = 1e-5


def reference(x, weight, eps):
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight.astype(np.float64)


def tolerances(hidden_size, dtype):
    """One rounding to dtype, after float32 roundings: a thread's and the warps' additions, which the square root
    halves, and some ten for the squares, the mean, the root and the products."""
    num_warps, groups = next(tile for tile in TILES if hidden_size <= 256 * tile[0] * tile[1])
    additions = 8 * groups + 5 + num_warps
    return {"rtol": UNIT_ROUNDOFF[dtype] + (additions / 2 + 10) * 2.0**-24, "atol": SMALLEST_SUBNORMAL[dtype]}


def operands(rng, num_tokens, hidden_size, dtype):
    x = rng.standard_normal((num_tokens, hidden_size), np.float32)
    x[:, 0] = 50  # outliers in the first and last place: a lost thread shows
    x[-1, -1] = -200
    weight = (1 + rng.standard_normal(hidden_size)).astype(dtype)
    return x, weight


def cases():
    """The largest row of each tile, 8 elements less and more; the types take turns: fewer kernels to build."""
    for i, tile in enumerate(TILES):
        largest = 256 * tile[0] * tile[1]
        for hidden_size in (largest - 8, largest, largest + 8):
            if hidden_size <= MAX_HIDDEN_SIZE:
                yield 2, hidden_size, HALF_TYPES[(i + (hidden_size > largest)) % 2]
    for dtype in HALF_TYPES:
        yield 1, 8, dtype
        yield 37, 576, dtype


@pytest.mark.parametrize(("num_tokens", "hidden_size", "dtype"), list(cases()))
def test_rms_norm_matches_the_formula(num_tokens, hidden_size, dtype, runner, rng):
    x, weight = operands(rng, num_tokens, hidden_size, dtype)
    out = runner.array(poisoned(x.shape, dtype))
    rms_norm(out, runner.array(x), runner.array(weight), EPS)
    assert_close(runner.host(out), reference(x, weight, EPS), **tolerances(hidden_size, dtype))


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_extreme_rows(dtype, runner):
    """Zeros, a 16-bit type's subnormals and the largest numbers whose squares float32 can sum: each row is normed by
    itself."""
    hidden_size = 576
    x = np.array([[0], [3 * SMALLEST_SUBNORMAL[dtype]], [2.0**58], [-1]], FLOAT32) * np.ones(hidden_size, FLOAT32)
    weight = np.ones(hidden_size, dtype)
    out = runner.array(poisoned(x.shape, dtype))
    rms_norm(out, runner.array(x), runner.array(weight), EPS)
    assert_close(runner.host(out), reference(x, weight, EPS), **tolerances(hidden_size, dtype))


def test_a_row_does_not_depend_on_its_neighbours(runner, rng):
    x, weight = operands(rng, 5, 1032, BFLOAT16)
    x[1, 7] = np.nan

    def norm(rows):
        out = runner.array(poisoned(rows.shape, BFLOAT16))
        rms_norm(out, runner.array(rows), runner.array(weight), EPS)
        return runner.host(out).view(np.uint16)

    together = norm(x)
    assert np.isnan(together[1].view(BFLOAT16)).all()
    for row in (0, 2, 4):
        assert np.array_equal(norm(x[row : row + 1])[0], together[row])


def test_no_tokens_launch_nothing():
    rms_norm(np.empty((0, 64), FLOAT16), np.empty((0, 64), FLOAT32), np.empty(64, FLOAT16), EPS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((3, 64), FLOAT16)}, r"x: expected shape \(any, any\) float32.* got \(3, 64\) float16"),
        ({"x": np.zeros(64, FLOAT32)}, r"x: expected shape \(any, any\)"),
        ({"x": np.zeros((64, 3), FLOAT32).T}, "x: expected .*not C-contiguous"),
        ({"x": np.zeros(8 + 3 * 64, FLOAT32)[1:193].reshape(3, 64)}, "x: must start at a multiple of 16 bytes"),
        ({"out": np.zeros((2, 64), FLOAT16)}, r"out: expected shape \(3, 64\) float16.* got \(2, 64\)"),
        ({"out": np.zeros((3, 64), FLOAT32)}, "out: dtype must be bfloat16 or float16; got float32"),
        ({"out": np.zeros(200, FLOAT16)[4:196].reshape(3, 64)}, "out: must start at a multiple of 16 bytes"),
        ({"weight": np.zeros(72, FLOAT16)}, r"weight: expected shape \(64\)"),
        ({"weight": np.zeros(64, BFLOAT16)}, r"weight: expected shape \(64\) float16"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    arrays = {"out": np.zeros((3, 64), FLOAT16), "x": np.zeros((3, 64), FLOAT32), "weight": np.zeros(64, FLOAT16)}
    with pytest.raises(ValueError, match=message):
        rms_norm(**(arrays | changes), eps=EPS)


@pytest.mark.parametrize(
    ("hidden_size", "message"),
    [
        (60, "multiple of 16 bytes"),
        (MAX_HIDDEN_SIZE + 8, f"8 to {MAX_HIDDEN_SIZE}; got 32776"),
        (0, "8 to 32768; got 0"),
    ],
)
def test_hidden_sizes_without_a_kernel_are_refused(hidden_size, message):
    out, x = np.zeros((2, hidden_size), FLOAT16), np.zeros((2, hidden_size), FLOAT32)
    with pytest.raises(ValueError, match=message):
        rms_norm(out, x, np.zeros(hidden_size, FLOAT16), EPS)
