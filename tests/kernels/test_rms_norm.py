"""rms_norm.cu against the formula in float64."""

import numpy as np
import pytest

from cupaged.kernels.checks import BFLOAT16, FLOAT16, FLOAT32, HALF_TYPES
from cupaged.kernels.rms_norm import MAX_HIDDEN_SIZE, TILES, add_rms_norm, rms_norm
from kernel_tools import SMALLEST_SUBNORMAL, UNIT_ROUNDOFF, assert_close, poisoned

EPS = 1e-5


def reference(x, weight, eps):
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight.astype(np.float64)


def tolerances(hidden_size, dtype):
    """One rounding to dtype, after float32 roundings: a thread's and the warps' additions, which the square root
    halves, and some ten for the squares, the mean, the root and the products."""
    num_warps, vecs = next(tile for tile in TILES if hidden_size <= 256 * tile[0] * tile[1])
    additions = 8 * vecs + 5 + num_warps
    return {"rtol": UNIT_ROUNDOFF[dtype] + (additions / 2 + 10) * 2.0**-24, "atol": SMALLEST_SUBNORMAL[dtype]}


def operands(rng, num_tokens, hidden_size, dtype):
    x = rng.standard_normal((num_tokens, hidden_size)).astype(dtype)
    x[:, 0] = 50  # outliers in the first and last place: a lost thread shows
    x[-1, -1] = -200
    weight = (1 + rng.standard_normal(hidden_size)).astype(dtype)
    return x, weight


def cases():
    """The largest row of each tile, one vector less and more; the types take turns, so that fewer kernels are built."""
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


@pytest.mark.parametrize(("num_tokens", "hidden_size", "dtype"), list(cases()))
def test_add_rms_norm_norms_the_rounded_sum(num_tokens, hidden_size, dtype, runner, rng):
    x, weight = operands(rng, num_tokens, hidden_size, dtype)
    residual = (rng.standard_normal(x.shape) * 10).astype(dtype)
    total = (residual.astype(np.float32) + x.astype(np.float32)).astype(dtype)
    out, device_residual, device_x = (runner.array(a) for a in (poisoned(x.shape, dtype), residual, x))
    add_rms_norm(out, device_residual, device_x, runner.array(weight), EPS)
    assert np.array_equal(runner.host(device_residual), total)
    assert np.array_equal(runner.host(device_x), x)
    assert_close(runner.host(out), reference(total, weight, EPS), **tolerances(hidden_size, dtype))


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_extreme_rows(dtype, runner):
    """Zeros, subnormals and the largest numbers whose squares float32 can sum: each row is normed by itself."""
    hidden_size = 576
    tiny = SMALLEST_SUBNORMAL[dtype]
    large = 60000 if dtype == FLOAT16 else 2.0**58
    x = np.array([[0], [3 * tiny], [large], [-1]], dtype) * np.ones((1, hidden_size), dtype)
    weight = np.ones(hidden_size, dtype)
    out = runner.array(poisoned(x.shape, dtype))
    rms_norm(out, runner.array(x), runner.array(weight), EPS)
    assert_close(runner.host(out), reference(x, weight, EPS), **tolerances(hidden_size, dtype))


def test_subnormals_are_added_and_not_flushed(runner):
    tiny = SMALLEST_SUBNORMAL[BFLOAT16]
    x = np.full((1, 64), 3 * tiny, BFLOAT16)
    residual, out = runner.array(np.full((1, 64), 4 * tiny, BFLOAT16)), runner.array(poisoned((1, 64), BFLOAT16))
    add_rms_norm(out, residual, runner.array(x), runner.array(np.ones(64, BFLOAT16)), EPS)
    assert (runner.host(residual).astype(np.float64) == 7 * tiny).all()


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
    nothing = np.empty((0, 64), FLOAT16)
    rms_norm(nothing, nothing, np.empty(64, FLOAT16), EPS)
    add_rms_norm(nothing, nothing, nothing, np.empty(64, FLOAT16), EPS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((3, 64), FLOAT32)}, "x: dtype must be bfloat16 or float16; got float32"),
        ({"x": np.zeros(64, FLOAT16)}, r"x: expected shape \(any, any\)"),
        ({"x": np.zeros((64, 3), FLOAT16).T}, "x: expected .*not C-contiguous"),
        ({"x": np.zeros(8 + 3 * 64, FLOAT16)[1:193].reshape(3, 64)}, "x: must start at a multiple of 16 bytes"),
        ({"out": np.zeros((2, 64), FLOAT16)}, r"out: expected shape \(3, 64\) float16.* got \(2, 64\)"),
        ({"out": np.zeros((3, 64), BFLOAT16)}, "out: expected .* float16"),
        ({"residual": np.zeros((3, 72), FLOAT16)}, r"residual: expected shape \(3, 64\)"),
        ({"residual": np.zeros((3, 64), FLOAT32)}, "residual: expected .* float16"),
        ({"residual": np.zeros(200, FLOAT16)[4:196].reshape(3, 64)}, "residual: must start at a multiple of 16"),
        ({"weight": np.zeros(72, FLOAT16)}, r"weight: expected shape \(64\)"),
        ({"weight": np.zeros(64, FLOAT32)}, r"weight: expected shape \(64\) float16"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    arrays = {name: np.zeros((3, 64), FLOAT16) for name in ("out", "residual", "x")}
    arrays |= {"weight": np.zeros(64, FLOAT16)} | changes
    with pytest.raises(ValueError, match=message):
        add_rms_norm(**arrays, eps=EPS)
    if "residual" not in changes:
        del arrays["residual"]
        with pytest.raises(ValueError, match=message):
            rms_norm(**arrays, eps=EPS)


@pytest.mark.parametrize(
    ("hidden_size", "message"),
    [
        (60, "multiple of 16 bytes"),
        (MAX_HIDDEN_SIZE + 8, f"8 to {MAX_HIDDEN_SIZE}; got 32776"),
        (0, "8 to 32768; got 0"),
    ],
)
def test_hidden_sizes_without_a_kernel_are_refused(hidden_size, message):
    x = np.zeros((2, hidden_size), FLOAT16)
    with pytest.raises(ValueError, match=message):
        rms_norm(np.zeros_like(x), x, np.zeros(hidden_size, FLOAT16), EPS)
