"""partial_sums.cu reads every element once: integers, whose sums float32 holds exactly, add up."""

from dataclasses import replace

import numpy as np
import pytest

from cupaged.kernels import partial_sums as launcher
from cupaged.kernels.checks import FLOAT16, FLOAT32
from cupaged.kernels.device import DeviceInfo, device_info, set_device_info
from cupaged.kernels.partial_sums import NUM_THREADS, UNROLL, num_partial_sums, partial_sums
from kernel_tools import HostRunner, is_poison, poisoned

TURN = 4 * NUM_THREADS * UNROLL  # elements that a thread block takes in a turn


@pytest.fixture
def two_thread_blocks(monkeypatch, runner):
    monkeypatch.setattr(launcher, "THREAD_BLOCKS_PER_SM", 2)
    on_host = isinstance(runner, HostRunner)
    device = DeviceInfo("sm_80", num_sms=108, max_shared_bytes=100 << 10) if on_host else device_info()
    set_device_info(replace(device, num_sms=1))
    yield
    set_device_info(None)


def expected_sums(x: np.ndarray) -> np.ndarray:
    """Thread block b takes turns b, b + 2, b + 4 and so on."""
    turns = [x[start : start + TURN].astype(np.float64).sum() for start in range(0, len(x), TURN)]
    return np.array([sum(turns[0::2]), sum(turns[1::2])])


@pytest.mark.parametrize("size", [4, 4 * NUM_THREADS, TURN - 4, TURN, TURN + 4, 2 * TURN, 5 * TURN + 4 * 77])
@pytest.mark.usefixtures("two_thread_blocks")
def test_every_element_is_added_once(size, runner, rng):
    x = rng.integers(-100, 100, size).astype(np.float32)
    x[[0, -1]] = 5000, 7000
    out = runner.array(poisoned(num_partial_sums() + 1, np.float32))
    partial_sums(out[:-1], runner.array(x))
    sums = runner.host(out)
    assert num_partial_sums() == 2
    np.testing.assert_array_equal(sums[:2], expected_sums(x))
    assert is_poison(sums[2:]).all()


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (np.zeros(8, FLOAT16), np.zeros(2, FLOAT32), r"x: expected shape \(any\) float32"),
        (np.zeros(6, FLOAT32), np.zeros(2, FLOAT32), "x: a row must be a multiple of 16 bytes"),
        (np.zeros(9, FLOAT32)[1:], np.zeros(2, FLOAT32), "x: must start at a multiple of 16 bytes"),
        (np.zeros(0, FLOAT32), np.zeros(2, FLOAT32), "x: must not be empty"),
        (np.zeros(8, FLOAT32), np.zeros(3, FLOAT32), r"out: expected shape \(2\) float32"),
    ],
)
@pytest.mark.usefixtures("two_thread_blocks")
def test_what_does_not_fit_is_named(x, out, message):
    with pytest.raises(ValueError, match=message):
        partial_sums(out, x)
