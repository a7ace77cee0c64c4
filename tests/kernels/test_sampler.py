"""sampler.cu draws what the NumPy sampler draws, token for token: both add up the same integers."""

import numpy as np
import pytest
from sampling_tools import EXACT_TEMPERATURE, draw_limit, make_rows, random_logits, top_p_limit

from cupaged.backends import sampling_reference
from cupaged.backends.base import SAMPLING_ROW
from cupaged.kernels import row_slices
from cupaged.kernels.row_slices import LIST_SIZE, NUM_THREADS, SLICE_SIZE, row_workspace_size
from cupaged.kernels.sampler import sample
from kernel_tools import poisoned

INF, NAN = np.inf, np.nan

# Every combination of filters, at the temperatures where they cut differently.
FILTERS = [
    {"temperature": temperature, "min_p": min_p, "top_k": top_k, "top_p": top_p}
    for temperature in (0.3, 1, 4)
    for min_p in (0, 0.05)
    for top_k in (0, 1, 40)
    for top_p in (1, 0.9, 0.2)
]


def run(runner, logits: np.ndarray, rows: np.ndarray, vocab_size: int, workspace=None) -> list[int]:
    """The tokens that the kernels draw."""
    token_ids = runner.array(np.full(len(rows), -7, np.int32))
    device_rows = runner.array(rows.view(np.uint8)).view(SAMPLING_ROW)  # CuPy can't upload a struct as it is
    if workspace is None:
        workspace = runner.zeros((row_workspace_size(len(rows), vocab_size),), np.uint8)
    greedy = not rows["temperature"].any()
    sample(token_ids, runner.array(logits), device_rows, vocab_size, workspace, greedy=greedy)
    return runner.host(token_ids).tolist()


def reference(logits: np.ndarray, rows: np.ndarray, vocab_size: int) -> list[int]:
    token_ids = np.full(len(rows), -8, np.int32)
    sampling_reference.sample(token_ids, logits, rows, vocab_size)
    return token_ids.tolist()


def filtered_rows(n: int, seed: int) -> np.ndarray:
    """n rows that go through FILTERS, each with a seed and a counter of its own."""
    rng = np.random.default_rng(seed)
    chosen = [FILTERS[i % len(FILTERS)] for i in range(n)]
    values = {name: [filters[name] for filters in chosen] for name in chosen[0]}
    random64 = rng.integers(2**64, size=(2, n), dtype=np.uint64)
    return make_rows(n, seed=random64[0], counter=random64[1], **values)


@pytest.mark.parametrize("vocab_size", [1, 2, 31, 32, 33, 1000, SLICE_SIZE, SLICE_SIZE + 1, 9001])
def test_draws_what_the_reference_draws(runner, vocab_size):
    num_rows = len(FILTERS)
    logits = np.stack([random_logits(seed, vocab_size) for seed in range(num_rows)])
    rows = filtered_rows(num_rows, seed=vocab_size)
    tokens = run(runner, logits, rows, vocab_size)
    assert tokens == reference(logits, rows, vocab_size)
    assert len(set(tokens)) > min(vocab_size, 20) / 2  # not always the same


def test_rows_that_are_all_greedy(runner):
    """...between rows that are not, in the same workspace."""
    vocab_size, num_rows = 9001, len(FILTERS)
    workspace = runner.zeros((row_workspace_size(num_rows, vocab_size),), np.uint8)
    for seed in range(4):
        logits = np.stack([random_logits(num_rows * seed + i, vocab_size) for i in range(num_rows)])
        rows = filtered_rows(num_rows, seed) if seed % 2 else make_rows(num_rows, temperature=0)
        assert run(runner, logits, rows, vocab_size, workspace) == reference(logits, rows, vocab_size)


def test_a_large_vocabulary(runner):
    """Lists of a few tokens, of many, and rows whose ties don't fit into one."""
    vocab_size = 70_001
    rng = np.random.default_rng(3)
    spread = [0.5, 0.5, 3, 3, 0.5, 0, 0]  # the last rows are one large tie
    logits = (rng.normal(0, 1, (len(spread), vocab_size)) * np.array(spread)[:, None]).astype(np.float32)
    top_k = [0, 0, 40, 0, 500, 100, 0]
    top_p = [0.9, 1, 0.95, 0.95, 0.5, 0.5, 0.3]
    assert 500 < LIST_SIZE < vocab_size
    rows = make_rows(len(spread), seed=5, top_p=top_p, top_k=top_k)
    tokens = run(runner, logits, rows, vocab_size)
    assert tokens == reference(logits, rows, vocab_size)


@pytest.mark.parametrize("target", [1, 2 * len(FILTERS)])
def test_thread_blocks_that_take_several_slices_draw_the_same(runner, monkeypatch, target):
    """All of a row's three slices by one thread block, or by two."""
    monkeypatch.setattr(row_slices, "TARGET_THREAD_BLOCKS", target)
    test_draws_what_the_reference_draws(runner, 2 * SLICE_SIZE + 1)


def test_a_workspace_serves_launches_of_all_sizes(runner):
    workspace = runner.zeros((row_workspace_size(len(FILTERS), 9001),), np.uint8)
    for num_rows, vocab_size in [(len(FILTERS), 777), (3, 9001), (len(FILTERS), 9001), (len(FILTERS), 40)]:
        logits = np.stack([random_logits(seed, vocab_size) for seed in range(num_rows)])
        rows = filtered_rows(num_rows, seed=num_rows)
        assert run(runner, logits, rows, vocab_size, workspace) == reference(logits, rows, vocab_size)


def test_k_goes_from_few_groups_to_more_than_there_are(runner):
    """A slice has a group for each thread at most. In half of the rows few tokens are finite."""
    top_k = [1, 5, NUM_THREADS // 2, NUM_THREADS // 2 + 1, NUM_THREADS, NUM_THREADS + 1, 1000, SLICE_SIZE - 1]
    num_rows = 2 * len(top_k)
    logits = np.stack([random_logits(seed, SLICE_SIZE) for seed in range(num_rows)])
    logits[::2, np.arange(SLICE_SIZE) % 100 != 7] = -INF
    rows = make_rows(num_rows, seed=np.arange(num_rows), temperature=50, top_k=np.repeat(top_k, 2))
    assert run(runner, logits, rows, SLICE_SIZE) == reference(logits, rows, SLICE_SIZE)


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.5, "top_k": 5, "top_p": 0.9}])
def test_many_draws_from_one_row(runner, filters):
    """All tokens with mass are reached, and none without."""
    num_draws = 300
    logits = np.log(np.float32([0.05, 0.3, 0.01, 0.2, 0.14, 0.05, 0.15, 0.1]))
    rows = make_rows(num_draws, seed=1, counter=np.arange(num_draws), **filters)
    tokens = run(runner, np.tile(logits, (num_draws, 1)), rows, 8)
    assert tokens == reference(np.tile(logits, (num_draws, 1)), rows, 8)
    kept = np.flatnonzero(sampling_reference.kept_masses(logits, rows[0]) >= 2**36)
    assert set(kept) <= set(tokens)


def test_top_p_is_exact_to_the_unit(runner):
    for reached, num_kept in [(True, 1), (False, 2)]:
        logits, top_p = top_p_limit(reached)
        rows = make_rows(100, counter=np.arange(100), temperature=EXACT_TEMPERATURE, top_p=top_p)
        assert set(run(runner, np.tile(logits, (100, 1)), rows, logits.size)) == set(range(num_kept))


@pytest.mark.parametrize(("spread", "top_k"), [(1, 0), (40, 0), (40, 100)])
def test_a_draw_on_the_limit_belongs_to_the_next_token(runner, spread, top_k):
    """Side by side, and with `spread` ids from one token to the next, so that warps part at the limit; and where they
    are the few tokens that top_k leaves."""
    for counter in range(5):
        logits, token = draw_limit(sampling_reference.philox_u64(1, counter))
        spaced = np.full((1, logits.size * spread), -INF, np.float32)
        spaced[0, ::spread] = logits
        assert logits.size < 100
        rows = make_rows(temperature=EXACT_TEMPERATURE, seed=1, counter=counter, top_k=top_k)
        assert run(runner, spaced, rows, spaced.size) == [token * spread]


def test_ties_stay_and_fall_to_the_lowest_id(runner):
    logits = np.float32([[1, 5, 3, 3, -0.0, 3, 0.0, 5]] * 60)
    temperature, top_k = [0] * 20 + [100] * 40, [0] * 20 + [3] * 20 + [7] * 20
    rows = make_rows(60, counter=np.arange(60), temperature=temperature, top_k=top_k)
    tokens = run(runner, logits, rows, 8)
    assert tokens == reference(logits, rows, 8)
    assert set(tokens[:20]) == {1}
    assert set(tokens[20:40]) == {1, 2, 3, 5, 7}
    assert {4, 6} <= set(tokens[40:])  # -0 and +0 are one tie


def test_a_draw_depends_on_its_own_row_alone(runner):
    logits = np.stack([random_logits(seed, 777) for seed in range(5)])
    rows = make_rows(5, seed=[7, 7, 0, 2, 3], counter=4, temperature=[1, 2, 0, 1, 0.5], top_k=[0, 9, 0, 0, 3])
    together = run(runner, logits, rows, 777)
    assert run(runner, logits[::-1], rows[::-1].copy(), 777) == together[::-1]
    assert [run(runner, logits[i : i + 1], rows[i : i + 1], 777)[0] for i in range(5)] == together


EXTREMES = {
    "nan": ([NAN, 0, NAN, -INF], {1}),
    "only nan": ([NAN, NAN], {-1}),
    "only -inf": ([-INF, -INF, -INF], {-1}),
    "inf wins": ([0, INF, 3e38, NAN], {1}),
    "two inf": ([0, INF, INF], {1, 2}),
    "overflow": ([3e38, -3e38], {0}),
    "subnormals": ([-1e-40, 1e-40, 0], {0, 1, 2}),
}


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("filters", [{}, {"top_k": 10**9}, {"top_k": 3, "top_p": 0.999, "min_p": 1e-30}])
def test_extreme_logits(runner, case, filters):
    values, expected = EXTREMES[case]
    logits = np.tile(np.float32(values), (40, 1))
    rows = make_rows(40, counter=np.arange(40), **filters)
    tokens = run(runner, logits, rows, len(values))
    assert tokens == reference(logits, rows, len(values))
    assert set(tokens) == expected


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1e-5}, {"temperature": 1e-45}, {"top_p": 1e-30}, {"top_p": 1e-45}, {"min_p": 1}, {"top_k": 1},
        {"temperature": 0, "top_p": 0.5, "top_k": 7},
    ],
)  # fmt: skip
def test_what_leaves_only_the_largest(runner, values):
    logits = np.stack([random_logits(seed, 1500) for seed in range(4)])
    rows = make_rows(4, seed=[1, 2, 3, 4], **values)
    assert run(runner, logits, rows, 1500) == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize("temperature", [0, 1, 100])
def test_the_padding_of_the_vocabulary_is_never_drawn(runner, temperature):
    logits = np.concatenate([np.zeros((50, 3)), np.full((50, 2), 1e30), np.full((50, 2), NAN)], axis=1)
    rows = make_rows(50, counter=np.arange(50), temperature=temperature)
    tokens = run(runner, logits.astype(np.float32), rows, 3)
    assert set(tokens) == ({0, 1, 2} if temperature else {0})


@pytest.mark.parametrize("values", [{"min_p": 2}, {"min_p": NAN}, {"top_p": -1}, {"top_p": NAN}, {"temperature": NAN}])
def test_nonsense_parameters_break_nothing(runner, values):
    """They are device data, which the launcher can't refuse: some token of the vocabulary comes out."""
    tokens = run(runner, np.stack([random_logits(1, 70)] * 3), make_rows(3, **values), 70)
    assert all(0 <= token < 70 for token in tokens)


def test_no_rows_launch_nothing(runner):
    assert run(runner, np.empty((0, 5), np.float32), make_rows(0), 5) == []


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ({"logits": np.zeros((2, 5), np.float16)}, "logits"),
        ({"logits": np.zeros((5, 2), np.float32).T}, "logits"),
        ({"token_ids": np.zeros(3, np.int32)}, "token_ids"),
        ({"token_ids": np.zeros(2, np.int64)}, "token_ids"),
        ({"rows": np.zeros(2, np.float32)}, "rows"),
        ({"vocab_size": 6}, "vocab_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"workspace": np.zeros(row_workspace_size(1, 5), np.uint8)}, "workspace"),
    ],
)
def test_bad_arguments_are_named(broken, named):
    arguments = {
        "token_ids": poisoned(2, np.int32), "logits": np.zeros((2, 5), np.float32), "rows": make_rows(2),
        "vocab_size": 5, "workspace": np.zeros(row_workspace_size(2, 5), np.uint8),
    } | broken  # fmt: skip
    with pytest.raises(ValueError, match=f"^{named}:"):
        sample(**arguments)
