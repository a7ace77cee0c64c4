"""activation.cu against the formula in float64."""

import numpy as np
import pytest

from cupaged.kernels.activation import ELEMENTS_PER_THREAD, NUM_THREADS, silu_and_mul
from cupaged.kernels.checks import BFLOAT16, FLOAT16, FLOAT32, HALF_TYPES
from kernel_tools import SMALLEST_SUBNORMAL, UNIT_ROUNDOFF, assert_close, poisoned

CHUNK = NUM_THREADS * ELEMENTS_PER_THREAD  # of a row, that one thread block takes


def reference(gate_up):
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * up


def check_against_formula(runner, gate_up):
    num_tokens, dtype = len(gate_up), gate_up.dtype
    intermediate_size = gate_up.shape[1] // 2
    out = runner.array(poisoned((num_tokens, intermediate_size), dtype))
    silu_and_mul(out, runner.array(gate_up))
    # One rounding to dtype after four in float32, of which expf's may be two units. Where exp(-gate) overflows
    # float32, from gate = -88.7 on, silu becomes 0, which is off by at most 89 * exp(-88.7) < 3e-37.
    up = np.abs(gate_up[:, intermediate_size:].astype(np.float64))
    atol = SMALLEST_SUBNORMAL[dtype] + 3e-37 * up
    assert_close(runner.host(out), reference(gate_up), rtol=UNIT_ROUNDOFF[dtype] + 6 * 2.0**-24, atol=atol)


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("intermediate_size", [8, 1536, CHUNK - 8, CHUNK, CHUNK + 8, 2 * CHUNK + 24])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_silu_and_mul_matches_the_formula(num_tokens, intermediate_size, dtype, runner, rng):
    gate_up = (3 * rng.standard_normal((num_tokens, 2 * intermediate_size))).astype(dtype)
    gate_up[0, 0], gate_up[-1, intermediate_size - 1] = -20, 40  # the first and the last gate
    gate_up[0, intermediate_size], gate_up[-1, -1] = -50, 200  # and up
    check_against_formula(runner, gate_up)


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_extreme_gates(dtype, runner):
    largest = 65504 if dtype == FLOAT16 else 3e38
    gates = [0, -0.0, largest, -largest, -87, -88, -89, -104, 1e-7, -1e-7, 100, -17, 17, np.inf, np.nan, 1]
    gate_up = np.array([gates + [1] * 15 + [np.inf]], dtype)
    check_against_formula(runner, gate_up)


def test_nothing_launches_nothing():
    silu_and_mul(np.empty((0, 64), FLOAT16), np.empty((0, 128), FLOAT16))
    silu_and_mul(np.empty((3, 0), FLOAT16), np.empty((3, 0), FLOAT16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": np.zeros((3, 64), FLOAT32)}, "out: dtype must be bfloat16 or float16; got float32"),
        ({"out": np.zeros((64, 3), FLOAT16).T}, "out: expected .*not C-contiguous"),
        ({"out": np.zeros(64, FLOAT16)}, r"out: expected shape \(any, any\)"),
        ({"out": np.zeros(200, FLOAT16)[1:193].reshape(3, 64)}, "out: must start at a multiple of 16 bytes"),
        ({"gate_up": np.zeros((3, 64), FLOAT16)}, r"gate_up: expected shape \(3, 128\) float16.* got \(3, 64\)"),
        ({"gate_up": np.zeros((3, 128), BFLOAT16)}, "gate_up: expected .* float16"),
        ({"gate_up": np.zeros(400, FLOAT16)[4:388].reshape(3, 128)}, "gate_up: must start at a multiple of 16 bytes"),
        ({"out": np.zeros((3, 60), FLOAT16), "gate_up": np.zeros((3, 120), FLOAT16)}, "out: a row must be a multiple"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    arrays = {"out": np.zeros((3, 64), FLOAT16), "gate_up": np.zeros((3, 128), FLOAT16)}
    with pytest.raises(ValueError, match=message):
        silu_and_mul(**(arrays | changes))
