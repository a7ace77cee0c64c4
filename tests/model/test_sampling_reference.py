"""The NumPy sampler against float64 formulas: its probabilities, its filters, its draws, and the extremes."""

import math

import numpy as np
import pytest
from sampling_tools import EXACT_TEMPERATURE, draw_limit, make_rows, random_logits, top_p_limit

from cupaged.backends.sampling_reference import kept_masses, logprobs, philox4x32, philox_u64, sample, token_masses

INF, NAN = np.inf, np.nan


def draw(logits, vocab_size: int | None = None, **values) -> int:
    """The token drawn from one row of logits."""
    logits = np.array([logits], np.float32)
    token_ids = np.full(1, -7, np.int32)
    sample(token_ids, logits, make_rows(**values), vocab_size or logits.shape[1])
    return int(token_ids[0])


def exponent_error(logits: np.ndarray, temperature: float) -> np.ndarray:
    """By how much, relatively, a mass may be off before it is rounded down to a whole number: its exponent is rounded
    in the difference, in log2(e), in the quotient, in the product, and cut to 26 bits; the polynomial adds 2^-27."""
    exponent = (logits.max() - logits.astype(np.float64)) / temperature / math.log(2)
    return math.log(2) * (exponent * 4.01 * 2**-24 + 2**-26) + 2**-27


# -- random numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that Random123 publishes for philox4x32, 10 rounds
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert list(philox4x32(tuple(counter), tuple(key))) == expected


def test_philox_u64_uses_all_bits_of_seed_and_counter():
    assert philox_u64(0, 0) == 0xE169C58D_6627E8D5
    bits = [1 << i for i in range(64)]
    assert len({philox_u64(bit, 0) for bit in bits} | {philox_u64(0, bit) for bit in bits}) == 128


# -- masses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-5, 0.1, 0.7, 1.0, 3.3, 100.0])
def test_masses_are_the_softmax(temperature):
    logits = random_logits(1, 4000) * np.float32(temperature)
    masses = token_masses(logits, temperature).astype(np.float64)
    expected = 2.0**40 * np.exp((logits.astype(np.float64) - logits.max()) / np.float32(temperature))
    assert masses.max() == 2**40
    assert np.count_nonzero(expected > 1e4) > 2000  # there is something to compare
    np.testing.assert_array_less(np.abs(masses - expected), expected * exponent_error(logits, temperature) + 1)


def test_a_mass_never_grows_as_the_logit_falls():
    logits = -np.sort(np.random.default_rng(2).uniform(0, 40, 300_000).astype(np.float32))
    near_octaves = -(np.arange(1, 30)[:, None] * math.log(2) + np.arange(-50, 50) * 1e-7).astype(np.float32)
    logits = np.sort(np.concatenate([logits, near_octaves.ravel(), np.float32([0])]))
    assert np.diff(token_masses(logits, 1.0).astype(np.int64)).min() >= 0


# -- filters -------------------------------------------------------------------------------------------------


def oracle(logits: np.ndarray, temperature, min_p, top_k, top_p) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens a float64 sampler surely keeps and which it may keep, given that masses are off a little."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / np.float32(temperature))
    error = exponent_error(logits, temperature)
    surely, maybe = weights * (1 - error) > (min_p + 2**-39 if min_p else 0), weights * (1 + error) >= min_p
    order = np.argsort(-logits, kind="stable")
    if top_k:
        surely[order[top_k:]] = maybe[order[top_k:]] = False
    if top_p < 1:
        kept = order[maybe[order]]
        before = np.cumsum(weights[kept]) - weights[kept]  # the mass of the more likely ones
        margin = 2 * (np.sum(weights[kept] * error[kept]) + logits.size * 2.0**-40)  # of the sum, and of the target
        target = np.float32(top_p) * weights[kept].sum()
        surely[kept[before >= target - margin]] = False
        maybe[kept[before >= target + margin]] = False
    return surely, maybe


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 5.0])
@pytest.mark.parametrize(
    ("min_p", "top_k", "top_p"),
    [
        (0, 0, 1), (0, 1, 1), (0, 40, 1), (0, 0, 0.9), (0, 0, 0.01), (0.05, 0, 1), (1, 0, 1),
        (0, 50, 0.95), (0.02, 20, 0.5), (0, 5000, 0.99), (0, 0, 0.999),
    ],
)  # fmt: skip
def test_the_filters_keep_what_float64_keeps(temperature, min_p, top_k, top_p):
    for seed, n in enumerate([1, 2, 33, 257, 3000]):
        logits = random_logits(seed, n)
        row = make_rows(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)[0]
        kept = kept_masses(logits, row) > 0
        surely, maybe = oracle(logits, temperature, np.float32(min_p), top_k, top_p)
        positive = token_masses(logits, temperature) > 0  # probabilities below 2^-40 of the largest are 0
        assert kept[np.argmax(logits)]
        assert not np.any(kept & ~maybe)
        assert not np.any(surely & positive & ~kept)
        assert np.count_nonzero((surely ^ maybe) & positive) <= 3  # the margin leaves hardly anything open


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    for top_p, expected in [(0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 2, 3]), (0.91, [0, 1, 2, 3])]:
        assert np.flatnonzero(kept_masses(logits, make_rows(top_p=top_p)[0])).tolist() == expected


def test_top_p_counts_what_top_k_and_min_p_left():
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    # of 0.4 and 0.3 the first has 0.571
    assert np.flatnonzero(kept_masses(logits, make_rows(top_k=2, top_p=0.56)[0])).tolist() == [1]
    assert np.flatnonzero(kept_masses(logits, make_rows(top_k=2, top_p=0.58)[0])).tolist() == [1, 3]
    assert np.flatnonzero(kept_masses(logits, make_rows(min_p=0.7, top_p=0.56)[0])).tolist() == [1]


def test_top_p_is_exact_to_the_unit():
    for reached, num_kept in [(True, 1), (False, 2)]:
        logits, top_p = top_p_limit(reached)
        kept = kept_masses(logits, make_rows(temperature=EXACT_TEMPERATURE, top_p=top_p)[0])
        assert np.flatnonzero(kept).tolist() == list(range(num_kept))


def test_ties_with_the_last_kept_token_stay():
    logits = np.float32([1, 5, 3, 3, -0.0, 3, 0.0])
    assert np.flatnonzero(kept_masses(logits, make_rows(top_k=2)[0])).tolist() == [1, 2, 3, 5]
    assert np.flatnonzero(kept_masses(logits, make_rows(top_p=0.8)[0])).tolist() == [1, 2, 3, 5]
    assert np.flatnonzero(kept_masses(logits, make_rows(top_k=6)[0])).tolist() == [0, 1, 2, 3, 4, 5, 6]


# -- draws ---------------------------------------------------------------------------------------------------


def chi_square_limit(degrees: int) -> float:
    """What chi-square exceeds once in a million times (Wilson and Hilferty's approximation)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.753 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize(
    "values", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.9}]
)
@pytest.mark.parametrize("varied", ["counter", "seed"])
def test_draws_follow_the_distribution(values, varied):
    num_draws = 8000
    logits = np.log(np.array([0.05, 0.3, 0.01, 0.2, 0.14, 0.05, 0.15, 0.1], np.float32))
    rows = make_rows(num_draws, seed=99, **values)
    rows[varied] = np.arange(num_draws)
    token_ids = np.empty(num_draws, np.int32)
    sample(token_ids, np.broadcast_to(logits, (num_draws, 8)), rows, 8)

    masses = kept_masses(logits, rows[0]).astype(np.float64)
    expected = num_draws * masses / masses.sum()
    observed = np.bincount(token_ids, minlength=8)
    assert observed[expected == 0].sum() == 0
    likely = expected > 0
    chi_square = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi_square < chi_square_limit(likely.sum() - 1)


def test_the_draw_is_the_inverse_cdf_in_id_order():
    logits = random_logits(5, 40)
    row = make_rows(seed=2**63 + 11, counter=2**40 + 3, top_k=17)[0]
    masses = [int(mass) for mass in kept_masses(logits, row)]
    point = philox_u64(2**63 + 11, 2**40 + 3) * sum(masses) >> 64
    running, expected = 0, None
    for token, mass in enumerate(masses):
        running += mass
        if expected is None and running > point:
            expected = token
    assert draw(logits, seed=2**63 + 11, counter=2**40 + 3, top_k=17) == expected


def test_a_draw_on_the_limit_belongs_to_the_next_token():
    for counter in range(10):
        logits, token = draw_limit(philox_u64(1, counter))
        assert draw(logits, temperature=EXACT_TEMPERATURE, seed=1, counter=counter) == token


def test_a_draw_depends_on_its_own_row_alone():
    logits = np.stack([random_logits(seed, 500) for seed in range(6)])
    rows = make_rows(6, seed=[7, 7, 7, 1, 2, 3], counter=4, temperature=[1, 0, 2, 0.5, 1, 1], top_k=[0, 0, 9, 0, 0, 3])
    together = np.empty(6, np.int32)
    sample(together, logits, rows, 500)
    backwards = np.empty(6, np.int32)
    sample(backwards, logits[::-1], rows[::-1], 500)
    assert together.tolist() == backwards[::-1].tolist()
    for i in range(6):
        alone = np.empty(1, np.int32)
        sample(alone, logits[i : i + 1], rows[i : i + 1], 500)
        assert alone[0] == together[i]


# -- extremes ------------------------------------------------------------------------------------------------

FIRST_TOKENS = [{"counter": counter} for counter in range(20)]


def test_greedy_takes_the_lowest_of_the_largest():
    assert draw([1, 7, 7, 2], temperature=0) == 1
    assert draw([-0.0, 0.0], temperature=0) == 0
    assert draw([NAN, 1, NAN, 3, 3], temperature=0) == 3


def test_nan_counts_as_minus_infinity():
    for values in FIRST_TOKENS:
        assert draw([NAN, 0, NAN, -INF], **values) == 1
    assert draw([NAN, NAN], temperature=0) == draw([NAN, NAN]) == -1


def test_a_row_without_a_logit_gives_no_token():
    assert draw([-INF] * 3, temperature=0) == draw([-INF] * 3) == draw([-INF] * 3, top_k=2, top_p=0.5) == -1


def test_infinity_wins():
    for values in FIRST_TOKENS:
        assert draw([0, INF, 3e38, NAN], **values) == 1
    assert {draw([0, INF, INF], **values) for values in FIRST_TOKENS} == {1, 2}
    assert draw([0, INF, INF], temperature=0) == 1


def test_tiny_top_p_and_temperature_leave_the_largest():
    logits = random_logits(8, 1000)
    best = int(logits.argmax())
    for values in FIRST_TOKENS:
        assert draw(logits, top_p=1e-30, **values) == best
        assert draw(logits, temperature=1e-5, **values) == best
        assert draw(logits, min_p=1, **values) == best
        assert draw(logits, top_k=1, **values) == best


def test_top_k_above_the_vocabulary_keeps_all():
    logits = random_logits(9, 30)
    assert [draw(logits, top_k=10**9, **values) for values in FIRST_TOKENS] == [
        draw(logits, **values) for values in FIRST_TOKENS
    ]


def test_the_padding_of_the_vocabulary_is_never_drawn():
    logits = [1.0, 2.0, 3.0, 1e30, INF, NAN]
    assert draw(logits, vocab_size=3, temperature=0) == 2
    assert {draw(logits, vocab_size=3, temperature=100, **values) for values in FIRST_TOKENS} == {0, 1, 2}


def test_extreme_logits_overflow_nothing():
    for values in FIRST_TOKENS:
        assert draw([3e38, -3e38], temperature=100, **values) == 0
        assert draw([1e-40, -3e38], temperature=1e-5, **values) == 0


# -- log probabilities ---------------------------------------------------------------------------------------


def run_logprobs(logits, token_ids, k: int, vocab_size: int | None = None):
    logits = np.array(logits, np.float32)
    num_rows = len(logits)
    top_ids = np.full((num_rows, 1 + k), -9, np.int32)
    top_logprobs = np.full((num_rows, 1 + k), NAN, np.float32)
    ranks = np.full(num_rows, -9, np.int32)
    logprobs(top_ids, top_logprobs, ranks, logits, np.array(token_ids, np.int32), vocab_size or logits.shape[1])
    return top_ids, top_logprobs, ranks


@pytest.mark.parametrize("k", [0, 1, 5, 20])
def test_logprobs_are_log_softmax(k):
    logits = np.stack([random_logits(seed, 3000) for seed in range(3)])
    token_ids = [int(logits[0].argmax()), 17, 2999]
    top_ids, top_logprobs, ranks = run_logprobs(logits, token_ids, k)
    wide = logits.astype(np.float64)
    expected = wide - wide.max(axis=1, keepdims=True)
    expected -= np.log(np.exp(expected).sum(axis=1, keepdims=True))
    for i, token in enumerate(token_ids):
        order = np.argsort(-logits[i], kind="stable")
        assert top_ids[i].tolist() == [token, *order[:k]]
        assert ranks[i] == 1 + order.tolist().index(token)
        # one rounding each of the difference, the logarithm and their difference, and of the sum's 3000 terms
        assert np.abs(top_logprobs[i] - expected[i, top_ids[i]]).max() <= 3e-7 * (1 + np.abs(expected[i]).max())


def test_logprobs_ties_go_by_id_and_share_a_rank():
    top_ids, top_logprobs, ranks = run_logprobs([[1, 3, 3, 2, 3]], [4], 4)
    assert top_ids.tolist() == [[4, 1, 2, 4, 3]]
    assert ranks.tolist() == [1]
    assert top_logprobs[0, 0] == top_logprobs[0, 1] == top_logprobs[0, 3]


def test_logprobs_of_odd_rows():
    logits = [[NAN, 0, -INF, 0], [-INF] * 4, [INF, 0, 0, NAN]]
    top_ids, top_logprobs, ranks = run_logprobs(logits, [0, -1, 0], 3)
    assert top_ids.tolist() == [[0, 1, 3, 0], [-1, 0, 1, 2], [0, 0, 1, 2]]
    half = np.float32(math.log(0.5))
    expected = [[-INF, half, half, -INF], [-INF] * 4, [0, 0, -INF, -INF]]
    np.testing.assert_allclose(top_logprobs, np.float32(expected), rtol=1e-6)
    assert ranks.tolist() == [3, 1, 1]


def test_logprobs_past_the_vocabulary():
    top_ids, top_logprobs, ranks = run_logprobs([[0, 1, 50, NAN]], [0], 3, vocab_size=2)
    assert top_ids.tolist() == [[0, 1, 0, -1]]
    assert top_logprobs[0, 3] == -INF
    assert np.exp(top_logprobs[0, 1:]).sum() == pytest.approx(1)
    assert ranks.tolist() == [2]
