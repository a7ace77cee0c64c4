"""embedding.cu against indexing."""

import numpy as np
import pytest

from cupaged.kernels.checks import BFLOAT16, FLOAT16, FLOAT32
from cupaged.kernels.embedding import NUM_THREADS, embedding
from kernel_tools import FLOAT_DTYPES, is_poison, poisoned


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint32)


# One group of 8, a group less and more than the threads take in a turn, and several turns.
ROW_SIZES = [8, (NUM_THREADS - 1) * 8, NUM_THREADS * 8, (NUM_THREADS + 1) * 8, 576, 5 * NUM_THREADS * 8]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("hidden_size", ROW_SIZES)
def test_rows_are_those_of_the_table(dtype, hidden_size, runner, rng):
    """float32 holds every 16-bit value: any bits that are a number, subnormals and infinities too, come out as it."""
    num_rows = 7
    weight = rng.integers(0, 256, (num_rows, hidden_size * dtype.itemsize), np.uint8).view(dtype)
    with np.errstate(invalid="ignore"):
        weight[np.isnan(weight)] = np.inf  # which of its bits a NaN keeps is left open
    ids = np.array([6, 0, 3, 3, 5, 0], np.int32)
    out = runner.array(poisoned((len(ids), hidden_size), FLOAT32))
    embedding(out, runner.array(weight), runner.array(ids))
    assert np.array_equal(bits(runner.host(out)), bits(weight[ids].astype(FLOAT32)))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_nan_stays_nan(dtype, runner):
    out = runner.array(np.zeros((1, 8), FLOAT32))
    embedding(out, runner.array(np.full((2, 8), np.nan, dtype)), runner.array(np.array([1], np.int32)))
    assert np.isnan(runner.host(out)).all()


def test_ids_outside_the_table_give_zeros(runner, rng):
    weight = rng.standard_normal((5, 64)).astype(BFLOAT16)
    ids = np.array([-1, 4, 5, 2**31 - 1, -(2**31), 0], np.int32)
    out = runner.array(poisoned((len(ids), 64), FLOAT32))
    embedding(out, runner.array(weight), runner.array(ids))
    out = runner.host(out)
    assert np.array_equal(out[[1, 5]], weight[[4, 0]].astype(FLOAT32))
    assert (bits(out[[0, 2, 3, 4]]) == 0).all()


def test_a_table_of_more_than_2_to_31_elements(runner):
    hidden_size = 4096
    num_rows = 2**31 // hidden_size + 2
    weight = runner.zeros((num_rows, hidden_size), FLOAT16)
    runner.copy_in(weight[num_rows - 1 :], np.ones((1, hidden_size), FLOAT16))
    out = runner.array(poisoned((2, hidden_size), FLOAT32))
    embedding(out, weight, runner.array(np.array([num_rows - 1, num_rows - 2], np.int32)))
    assert np.array_equal(runner.host(out), np.repeat([[1], [0]], hidden_size, axis=1))


def test_no_ids_launch_nothing():
    embedding(np.empty((0, 64), FLOAT32), np.empty((5, 64), FLOAT16), np.empty(0, np.int32))


def test_neighbours_of_out_are_left_alone(runner):
    out = runner.array(poisoned((4, 8), FLOAT32))
    embedding(out[1:3], runner.array(np.ones((2, 8), FLOAT32)), runner.array(np.array([0, 1], np.int32)))
    assert np.array_equal(is_poison(runner.host(out)).all(axis=1), [True, False, False, True])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight": np.zeros((5, 16), np.float64)},
            "weight: dtype must be bfloat16 or float16 or float32; got float64",
        ),
        ({"weight": np.zeros((5, 32), FLOAT16)[:, ::2]}, "weight: expected .* C-contiguous; got .*not C-contiguous"),
        ({"weight": np.zeros(16, FLOAT16)}, r"weight: expected shape \(any, any\) float16"),
        ({"ids": np.zeros(3, np.int64)}, r"ids: expected shape \(any\) int32.* got \(3,\) int64"),
        ({"ids": np.zeros((3, 1), np.int32)}, r"ids: expected shape \(any\)"),
        ({"out": np.zeros((2, 16), FLOAT32)}, r"out: expected shape \(3, 16\) float32.* got \(2, 16\)"),
        ({"out": np.zeros((3, 16), FLOAT16)}, r"out: expected shape \(3, 16\) float32.* got \(3, 16\) float16"),
        ({"out": np.zeros(64, FLOAT32)[2:50].reshape(3, 16)}, "out: must start at a multiple of 16"),
        ({"weight": np.zeros(96, FLOAT16)[4:84].reshape(5, 16)}, "weight: must start at a multiple of 16"),
        (
            {"weight": np.zeros((5, 12), FLOAT32), "out": np.zeros((3, 12), FLOAT32)},
            "weight: a row must be a multiple of 8 elements; got 12",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    arrays = {"out": np.zeros((3, 16), FLOAT32), "weight": np.zeros((5, 16), FLOAT16), "ids": np.zeros(3, np.int32)}
    with pytest.raises(ValueError, match=message):
        embedding(**(arrays | changes))
