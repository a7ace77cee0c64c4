"""What the tests of the matrix products share: operands that show mistakes, launches between guards, the formulas."""

from __future__ import annotations

import numpy as np

from cupaged.kernels.device import DeviceInfo
from cupaged.kernels.tuning import LinearPlan, LinearSm90Plan, LinearTile
from kernel_tools import SMALLEST_SUBNORMAL, UNIT_ROUNDOFF, assert_close, is_poison, poisoned

H100 = DeviceInfo("sm_90a", num_sms=132, max_shared_bytes=232448)
# Numbers of outputs that models have, and odd ones.
SIZES = (1, 8, 576, 960, 2048, 4096, 6144, 28672, 32001, 49152, 151936)
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


def chosen(tile) -> dict:
    """The argument that makes an operation take this tile, or plan."""
    if isinstance(tile, LinearTile):
        tile = LinearPlan(tile, 1)
    return {"plan" if isinstance(tile, LinearPlan | LinearSm90Plan) else "tile": tile}


def run(runner, operation, x, weight, bias, out_dtype, tile, added_to: np.ndarray | None = None, **more) -> np.ndarray:
    """The operation's out, before it all NaN or what is added to. What lies around it must not be written."""
    accumulate = added_to is not None
    out, buffer = guarded(runner, added_to if accumulate else poisoned((len(x), len(weight)), out_dtype))
    bias = None if bias is None else guarded(runner, bias)[0]
    operation(out, runner.array(x), runner.array(weight), bias, accumulate=accumulate, **chosen(tile), **more)
    buffer = runner.host(buffer)
    assert is_poison(buffer[:GUARD]).all()
    assert is_poison(buffer[GUARD + len(x) :]).all()
    return buffer[GUARD : GUARD + len(x)]


def assert_only_theirs(out: np.ndarray, *, row: int, column: int) -> None:
    """Assert that a NaN in this row of x and an infinity in this row of weight have reached no other results."""
    assert np.isnan(out[row]).all()
    others = np.delete(out, row, axis=0)
    assert (np.isinf(others[:, column])).all()
    assert np.isfinite(np.delete(others, column, axis=1)).all()


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


def gated(runner, operation, x, gate, up, tile, **more) -> np.ndarray:
    """The operation's out, NaN before it. What lies around it must not be written."""
    weight = np.stack([gate, up], axis=1).reshape(-1, gate.shape[1])
    out, buffer = guarded(runner, poisoned((len(x), len(gate)), gate.dtype))
    operation(out, guarded(runner, x)[0], guarded(runner, weight)[0], **chosen(tile), **more)
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


def assert_gated_matches_formula(out, x, gate, up):
    """Each sum errs as in assert_matches_formula; silu's slope is 1.1 at most. Then four roundings in float32, of which
    __expf's may be 2 + 1.2 * |gate| units and __fdividef's two, and one to out's type. Where exp(-gate) passes 2^126,
    from gate = -87.3 on, __fdividef makes silu 0."""
    dtype, k = out.dtype, x.shape[1]
    x, gate, up = (values.astype(np.float64) for values in (x, gate, up))
    g, u = x @ gate.T, x @ up.T
    g_error, u_error = ((k + 1) * 2.0**-23 * (np.abs(x) @ np.abs(matrix).T) for matrix in (gate, up))
    expected = silu(g) * u
    summing = 1.1 * g_error * (np.abs(u) + u_error) + np.abs(silu(g)) * u_error
    rounding = (UNIT_ROUNDOFF[dtype] + (6 + 1.2 * np.abs(g)) * 2.0**-24) * (np.abs(expected) + summing)
    tolerance = summing + rounding + SMALLEST_SUBNORMAL[dtype] + 1.2e-36 * np.abs(u)
    assert np.median(np.abs(expected)) > 20 * np.median(tolerance)
    assert_close(out, expected, atol=tolerance)
