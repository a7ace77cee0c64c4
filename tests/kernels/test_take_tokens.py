"""take_tokens.cu and its NumPy twin against a loop."""

import numpy as np
import pytest

from cupaged.backends.reference import ReferenceBackend
from cupaged.kernels.take_tokens import NUM_THREADS, take_tokens


@pytest.fixture(params=["kernel", "reference"])
def taken(request, runner):
    """token_ids as take_tokens leaves them."""

    def run(token_ids, drawn):
        token_ids, drawn = np.array(token_ids, np.int32), np.array(drawn, np.int32)
        if request.param == "reference":
            ReferenceBackend().take_tokens(token_ids, drawn)
            return token_ids.tolist()
        on_device = runner.array(token_ids)
        take_tokens(on_device, runner.array(drawn))
        return runner.host(on_device).tolist()

    return run


@pytest.mark.parametrize("num_tokens", [1, 2, NUM_THREADS - 1, NUM_THREADS, NUM_THREADS + 1, 3 * NUM_THREADS + 5])
def test_unknown_tokens_are_those_of_their_rows(num_tokens, taken, rng):
    drawn = rng.integers(0, 2**31, max(1, num_tokens // 2))
    drawn[0] = -1  # nothing could be drawn
    token_ids = [int(token_id) for token_id in rng.integers(-len(drawn), 1000, num_tokens)]  # a row serves several
    token_ids[-1] = -len(drawn)
    token_ids[0] = -1
    expected = [token_id if token_id >= 0 else drawn[-token_id - 1] for token_id in token_ids]
    assert taken(token_ids, drawn) == expected


def test_known_tokens_stay(taken):
    assert taken([0, 5, 2**31 - 1], [7, 8]) == [0, 5, 2**31 - 1]
    assert taken([3, 4], []) == [3, 4]


def test_rows_that_are_not_there_are_not_read(runner):
    memory = runner.array(np.array([10, 11, 12, 13], np.int32))
    token_ids = runner.array(np.array([-1, -2, -3, -(2**31), -4], np.int32))
    take_tokens(token_ids, memory[:2])
    assert runner.host(token_ids).tolist() == [10, 11, -3, -(2**31), -4]


def test_neighbours_are_left_alone(runner):
    token_ids = runner.array(np.full(4, -1, np.int32))
    take_tokens(token_ids[1:3], runner.array(np.array([5], np.int32)))
    assert runner.host(token_ids).tolist() == [-1, 5, 5, -1]


def test_no_tokens_launch_nothing():
    take_tokens(np.empty(0, np.int32), np.empty(3, np.int32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": np.zeros(3, np.int64)}, r"token_ids: expected shape \(any\) int32.* got \(3,\) int64"),
        ({"token_ids": np.zeros((3, 1), np.int32)}, r"token_ids: expected shape \(any\) int32"),
        ({"token_ids": np.zeros(6, np.int32)[::2]}, "token_ids: .* got .*not C-contiguous"),
        ({"drawn": np.zeros(3, np.float32)}, r"drawn: expected shape \(any\) int32.* got \(3,\) float32"),
        ({"drawn": np.zeros(6, np.int32)[::2]}, "drawn: .* got .*not C-contiguous"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        take_tokens(**({"token_ids": np.zeros(3, np.int32), "drawn": np.zeros(3, np.int32)} | changes))
