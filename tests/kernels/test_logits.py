"""logits.cu and its NumPy twin against formulas in float64."""

import numpy as np
import pytest

from cupaged.backends import sampling_reference
from cupaged.backends.base import LOGIT_EDIT
from cupaged.kernels import logits as kernels
from cupaged.kernels.checks import FLOAT32
from cupaged.kernels.logits import IDS_PER_THREAD, NUM_THREADS
from kernel_tools import SMALLEST_SUBNORMAL, assert_close, is_poison, poisoned

INF, NAN = np.inf, np.nan


class Kernels:
    """edit_logits and keep_allowed from NumPy arrays to a NumPy array."""

    def __init__(self, runner):
        self._runner = runner

    def edit_logits(self, logits, edits):
        logits = self._runner.array(logits)
        edits = self._runner.array(edits.view(np.uint8)).view(LOGIT_EDIT)  # CuPy can't upload a struct as it is
        kernels.edit_logits(logits, edits)
        return self._runner.host(logits)

    def keep_allowed(self, logits, rows, masks, vocab_size):
        logits = self._runner.array(logits)
        kernels.keep_allowed(logits, self._runner.array(rows), self._runner.array(masks), vocab_size)
        return self._runner.host(logits)


class Reference:
    def __init__(self, runner):
        pass

    def edit_logits(self, logits, edits):
        logits = logits.copy()
        sampling_reference.edit_logits(logits, edits)
        return logits

    def keep_allowed(self, logits, rows, masks, vocab_size):
        logits = logits.copy()
        sampling_reference.keep_allowed(logits, rows, masks, vocab_size)
        return logits


@pytest.fixture(params=[Kernels, Reference])
def ops(request, runner):
    return request.param(runner)


def edits_of(*entries) -> np.ndarray:
    return np.array(list(entries), LOGIT_EDIT)


# -- edit_logits ----------------------------------------------------------------------------------------------


def edited(logits, edits):
    """(what edit_logits gives, by how much each may be off), in float64."""
    expected, bound = logits.astype(np.float64), np.zeros(logits.shape)
    for edit in edits:
        place = edit["row"], edit["token"]
        if edit["bias"] == -INF:
            expected[place] = -INF
            continue
        biased = expected[place] + float(edit["bias"])
        repetition_penalty = float(edit["repetition_penalty"])
        scaled = biased / repetition_penalty if biased > 0 else biased * repetition_penalty
        expected[place] = scaled - float(edit["penalty"])
        if np.isfinite(expected[place]):  # roundings of the sum, of the product or quotient, and of the difference
            bound[place] = 1.01 * 2.0**-24 * (2 * abs(scaled) + abs(expected[place])) + SMALLEST_SUBNORMAL[FLOAT32]
    return expected, bound


@pytest.mark.parametrize("num_edits", [1, 2, NUM_THREADS - 1, NUM_THREADS, NUM_THREADS + 1, 3000])
def test_edit_logits_matches_the_formula(num_edits, ops, rng):
    num_rows, row_size = 5, 1001
    logits = rng.normal(0, 6, (num_rows, row_size)).astype(np.float32)
    places = rng.permutation(num_rows * row_size)[:num_edits]
    edits = np.zeros(num_edits, LOGIT_EDIT)
    edits["row"], edits["token"] = np.divmod(places, row_size)
    edits["bias"] = rng.choice([0, 0, -100, 3.7, -0.3, -INF], num_edits)
    edits["repetition_penalty"] = rng.choice([1, 1.1, 0.6, 5], num_edits)
    edits["penalty"] = rng.choice([0, 0.5, -1.25, 40], num_edits)
    actual = ops.edit_logits(logits, edits)
    expected, bound = edited(logits, edits)
    assert_close(actual, expected, atol=bound)
    untouched = np.setdiff1d(np.arange(logits.size), places)
    assert np.array_equal(actual.reshape(-1)[untouched], logits.reshape(-1)[untouched])


def test_the_order_is_bias_repetition_and_then_the_other_penalties(ops):
    logits = np.array([[1, 1, -3, -3, 2, -2]], np.float32)
    edits = edits_of(
        (0, 0, 3, 2, 0.5), (0, 1, -3, 2, 0.5), (0, 2, 7, 2, -1), (0, 3, -1, 2, -1), (0, 4, 0, 4, 0), (0, 5, 0, 4, 0)
    )  # fmt: skip
    expected = [(1 + 3) / 2 - 0.5, (1 - 3) * 2 - 0.5, (-3 + 7) / 2 + 1, (-3 - 1) * 2 + 1, 0.5, -8]
    assert ops.edit_logits(logits, edits).tolist() == [expected]


@pytest.mark.parametrize("logit", [INF, -INF, NAN, 0.0, 3e38, -3e38])
def test_a_forbidden_token_gets_minus_infinity_whatever_its_logit(logit, ops):
    logits = np.full((2, 3), logit, np.float32)
    actual = ops.edit_logits(logits, edits_of((1, 1, -INF, 1.3, -2), (0, 2, -INF, 0.5, 2)))
    assert (actual[[1, 0], [1, 2]] == -INF).all()
    assert np.array_equal(actual[[0, 0, 1, 1], [0, 1, 0, 2]], logits[[0, 0, 1, 1], [0, 1, 0, 2]], equal_nan=True)


def test_infinite_logits_stay_and_overflow_is_infinite(ops):
    logits = np.array([[INF, -INF, 3e38, -3e38]], np.float32)
    edits = edits_of((0, 0, -50, 1.5, 2), (0, 1, 50, 1.5, -2), (0, 2, 0, 1e-3, 0), (0, 3, 0, 1e3, 0))
    assert ops.edit_logits(logits, edits).tolist() == [[INF, -INF, INF, -INF]]


def test_no_edits_change_nothing(ops):
    logits = np.ones((2, 3), np.float32)
    assert (ops.edit_logits(logits, edits_of()) == 1).all()


def test_a_view_of_the_logits_leaves_its_neighbours_alone(runner):
    logits = runner.array(poisoned((4, 7), np.float32))
    runner.copy_in(logits[1:3], np.ones((2, 7), np.float32))
    edits = runner.array(edits_of((0, 0, 1, 1, 0), (1, 6, 1, 1, 0)).view(np.uint8)).view(LOGIT_EDIT)
    kernels.edit_logits(logits[1:3], edits)
    actual = runner.host(logits)
    assert actual[1, 0] == actual[2, 6] == 2
    assert np.array_equal(is_poison(actual).all(axis=1), [True, False, False, True])


def test_more_than_2_to_31_logits(runner):
    row_size = 1 << 20
    logits = runner.zeros((2049, row_size), np.float32)
    edits = runner.array(edits_of((2048, row_size - 1, 1.5, 1, 0)).view(np.uint8)).view(LOGIT_EDIT)
    kernels.edit_logits(logits, edits)
    rows, masks = np.array([2048], np.int32), np.full((1, row_size // 32), 0xFFFFFFFF, np.uint32)
    masks[0, 1] = 0xFFFFFFFE
    kernels.keep_allowed(logits, runner.array(rows), runner.array(masks), row_size)
    [last] = runner.host(logits[2048:])
    assert np.flatnonzero(last).tolist() == [32, row_size - 1]
    assert (last[32], last[-1]) == (-INF, 1.5)


# -- keep_allowed ---------------------------------------------------------------------------------------------


def masks_of(allowed: np.ndarray) -> np.ndarray:
    """allowed [k, vocab_size] bool as words of 32 bits, bit by bit; the bits past the vocabulary are set."""
    num_masks, vocab_size = allowed.shape
    masks = np.full((num_masks, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32)
    for i, token in np.argwhere(~allowed):
        masks[i, token // 32] &= np.uint32(0xFFFFFFFF ^ 1 << token % 32)
    return masks


PER_THREAD_BLOCK = NUM_THREADS * IDS_PER_THREAD


@pytest.mark.parametrize(
    "vocab_size",
    [1, 31, 32, 33, 1000, PER_THREAD_BLOCK - 1, PER_THREAD_BLOCK, PER_THREAD_BLOCK + 1, 2 * PER_THREAD_BLOCK + 17],
)
@pytest.mark.parametrize("padding", [0, 3])
def test_keep_allowed_matches_indexing(vocab_size, padding, ops, rng):
    logits = rng.standard_normal((5, vocab_size + padding)).astype(np.float32)
    logits[3, 0] = NAN
    rows = np.array([3, 0, 4], np.int32)
    allowed = rng.random((3, vocab_size)) < np.array([[0.5], [0.02], [0.98]])
    allowed[0, 0] = False
    expected = logits.copy()
    for row, mask in zip(rows, allowed, strict=True):
        expected[row, :vocab_size][~mask] = -INF
    actual = ops.keep_allowed(logits, rows, masks_of(allowed), vocab_size)
    assert np.array_equal(actual, expected, equal_nan=True)
    assert actual[3, 0] == -INF


def test_no_masks_change_nothing(ops):
    logits = np.ones((2, 33), np.float32)
    nothing = np.empty(0, np.int32), np.empty((0, 2), np.uint32)
    assert (ops.keep_allowed(logits, *nothing, 33) == 1).all()


# -- what does not fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": np.zeros((2, 5))}, "logits: expected .* float32"),
        ({"logits": np.zeros(5, FLOAT32)}, r"logits: expected shape \(any, any\)"),
        ({"logits": np.zeros((5, 2), FLOAT32).T}, "logits: .*not C-contiguous"),
        ({"edits": np.zeros(3, np.int32)}, r"edits: expected shape \(any\) .*row.*; got \(3,\) int32"),
        ({"edits": np.zeros((1, 3), LOGIT_EDIT)}, r"edits: expected shape \(any\)"),
    ],
)
def test_edit_logits_names_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        kernels.edit_logits(**({"logits": np.zeros((2, 5), FLOAT32), "edits": np.zeros(3, LOGIT_EDIT)} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": np.zeros((2, 40))}, "logits: expected .* float32"),
        ({"vocab_size": 0}, "vocab_size: expected 1 to 40 .*; got 0"),
        ({"vocab_size": 41}, "vocab_size: expected 1 to 40 .*; got 41"),
        ({"rows": np.zeros(3, np.int64)}, "rows: expected .* int32"),
        ({"rows": np.zeros(2, np.int32)}, r"masks: expected shape \(2, 2\) uint32"),
        ({"masks": np.zeros((3, 1), np.uint32)}, r"masks: expected shape \(3, 2\) uint32"),
        ({"masks": np.zeros((3, 2), np.int32)}, r"masks: expected .* uint32"),
    ],
)
def test_keep_allowed_names_what_does_not_fit(changes, message):
    arguments = {
        "logits": np.zeros((2, 40), FLOAT32),
        "rows": np.zeros(3, np.int32),
        "masks": np.zeros((3, 2), np.uint32),
        "vocab_size": 40,
    }
    with pytest.raises(ValueError, match=message):
        kernels.keep_allowed(**(arguments | changes))
