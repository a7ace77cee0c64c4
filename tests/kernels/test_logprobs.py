"""logprobs.cu against log-softmax in float64."""

import numpy as np
import pytest
from sampling_tools import random_logits

from cupaged.backends.base import MAX_TOP_TOKENS
from cupaged.kernels import row_slices
from cupaged.kernels.logprobs import logprobs
from cupaged.kernels.row_slices import LIST_SIZE, SLICE_SIZE, row_workspace_size
from kernel_tools import assert_close, poisoned

INF, NAN = np.inf, np.nan


def run(runner, logits, token_ids, k: int, vocab_size: int | None = None):
    """top_ids, top_logprobs, ranks as the kernel leaves them."""
    logits = np.array(logits, np.float32)
    num_rows = len(logits)
    outs = [
        runner.array(poisoned(shape, dtype))
        for shape, dtype in [((num_rows, 1 + k), np.int32), ((num_rows, 1 + k), np.float32), (num_rows, np.int32)]
    ]
    token_ids = runner.array(np.array(token_ids, np.int32))
    vocab_size = vocab_size or logits.shape[1]
    workspace = runner.zeros((row_workspace_size(num_rows, vocab_size),), np.uint8)
    logprobs(*outs, runner.array(logits), token_ids, vocab_size, workspace)
    return [runner.host(out) for out in outs]


@pytest.mark.parametrize("k", [0, 1, 5, 20, MAX_TOP_TOKENS])
@pytest.mark.parametrize("vocab_size", [1, 31, 33, SLICE_SIZE - 1, SLICE_SIZE, 9001])
def test_logprobs_are_log_softmax(runner, vocab_size, k):
    logits = np.stack([random_logits(seed, vocab_size + 2) for seed in range(3)])  # 2 of padding
    logits[:, vocab_size:] = [1e30, NAN]
    token_ids = [int(logits[0, :vocab_size].argmax()), vocab_size // 2, vocab_size - 1]
    top_ids, top_logprobs, ranks = run(runner, logits, token_ids, k, vocab_size)

    wide = logits[:, :vocab_size].astype(np.float64)
    expected = wide - wide.max(axis=1, keepdims=True)
    expected -= np.log(np.exp(expected).sum(axis=1, keepdims=True))
    found = min(k, vocab_size)
    for i, token in enumerate(token_ids):
        order = np.argsort(-logits[i, :vocab_size], kind="stable")
        assert top_ids[i].tolist() == [token, *order[:found], *[-1] * (k - found)]
        assert ranks[i] == 1 + order.tolist().index(token)
        assert np.all(top_logprobs[i, 1 + found :] == -INF)
        # Two roundings of each value, and in the sum's logarithm: in a slice one for each of a thread's 16 terms, 5 in
        # a warp, 8 over the warps, and as many over the slices; 2 units of expf for each term and of logf.
        terms = 2 * (16 + 5 + 8) + 4
        shown = [token, *order[:found]]
        assert_close(top_logprobs[i, : 1 + found], expected[i, shown], rtol=2 * 2**-24, atol=(terms + 12) * 2**-24)


def test_ties_go_by_id_and_share_a_rank(runner):
    logits = np.tile(np.float32([1, 3, 3, 2, 3]), (1, 500))  # ties across threads and within one
    top_ids, top_logprobs, ranks = run(runner, logits, [4], 6)
    assert top_ids.tolist() == [[4, 1, 2, 4, 6, 7, 9]]
    assert ranks.tolist() == [1]
    assert len(set(top_logprobs[0].tolist())) == 1
    assert run(runner, logits, [2498], 0)[2].tolist() == [1501]


@pytest.mark.parametrize("target", [1, 6])
def test_thread_blocks_that_take_several_slices_give_the_same(runner, monkeypatch, target):
    logits = np.stack([random_logits(seed, 2 * SLICE_SIZE + 1) for seed in range(3)])
    apart = run(runner, logits, [5, 6, 7], 4)
    monkeypatch.setattr(row_slices, "TARGET_THREAD_BLOCKS", target)
    for have, want in zip(run(runner, logits, [5, 6, 7], 4), apart, strict=True):
        assert have.tobytes() == want.tobytes()


def test_more_ties_than_a_list_holds(runner):
    logits = np.zeros((1, 2 * LIST_SIZE + 3), np.float32)
    logits[0, 1] = -1
    top_ids, _, ranks = run(runner, logits, [1], 3)
    assert top_ids.tolist() == [[1, 0, 2, 3]]
    assert ranks.tolist() == [2 * LIST_SIZE + 3]


def test_odd_rows(runner):
    logits = [[NAN, 0, -INF, 0], [-INF] * 4, [INF, 0, 0, NAN], [0, 0, 0, 0]]
    top_ids, top_logprobs, ranks = run(runner, logits, [0, -1, 0, 99], 3)
    assert top_ids.tolist() == [[0, 1, 3, 0], [-1, 0, 1, 2], [0, 0, 1, 2], [99, 0, 1, 2]]
    half, quarter = np.log(0.5), np.log(0.25)
    expected = [[-INF, half, half, -INF], [-INF] * 4, [0, 0, -INF, -INF], [-INF, quarter, quarter, quarter]]
    assert_close(top_logprobs, np.array(expected), rtol=1e-6)
    assert ranks.tolist() == [3, 1, 1, 5]


def test_a_row_does_not_depend_on_its_neighbours(runner):
    logits = np.stack([random_logits(seed, 1300) for seed in range(3)])
    together = run(runner, logits, [5, 6, 7], 4)
    for i in range(3):
        alone = run(runner, logits[i : i + 1], [5 + i], 4)
        for have, want in zip(alone, together, strict=True):
            assert have.tobytes() == want[i : i + 1].tobytes()


def test_no_rows_launch_nothing(runner):
    assert [len(out) for out in run(runner, np.empty((0, 5)), [], 2)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ({"logits": np.zeros((2, 5))}, "logits"),
        ({"token_ids": np.zeros(1, np.int32)}, "token_ids"),
        ({"ranks": np.zeros((2, 1), np.int32)}, "ranks"),
        ({"top_ids": np.zeros((2, 0), np.int32), "top_logprobs": np.zeros((2, 0), np.float32)}, "top_ids"),
        ({"top_ids": np.zeros((2, 130), np.int32), "top_logprobs": np.zeros((2, 130), np.float32)}, "top_ids"),
        ({"top_logprobs": np.zeros((2, 3), np.float32)}, "top_logprobs"),
        ({"vocab_size": 6}, "vocab_size"),
        ({"workspace": np.zeros(row_workspace_size(1, 5), np.uint8)}, "workspace"),
    ],
)
def test_bad_arguments_are_named(broken, named):
    arguments = {
        "top_ids": np.zeros((2, 4), np.int32), "top_logprobs": np.zeros((2, 4), np.float32),
        "ranks": np.zeros(2, np.int32), "logits": np.zeros((2, 5), np.float32), "token_ids": np.zeros(2, np.int32),
        "vocab_size": 5, "workspace": np.zeros(row_workspace_size(2, 5), np.uint8),
    } | broken  # fmt: skip
    with pytest.raises(ValueError, match=f"^{named}:"):
        logprobs(**arguments)
