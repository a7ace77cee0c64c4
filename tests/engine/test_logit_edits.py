"""The edits of a sequence against formulas, token by token, in float64; vLLM's order."""

import numpy as np
import pytest
from logit_formulas import expected_logits

from cupaged.backends import sampling_reference
from cupaged.engine.logit_edits import EditsOfRows, LogitEdits, LogitRules
from cupaged.sampling_params import SamplingParams

VOCAB_SIZE = 40
EOS = (0, 3)
INF = np.inf


class CharTokenizer:
    """Letters are tokens 10 to 35, a space in front of "q" makes one token with it, other spaces are token 36."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        merged = text.replace(" q", "Q")
        return [37 if c == "Q" else 36 if c == " " else 10 + ord(c) - ord("a") for c in merged]


def rules_of(prompt=(5,), **params) -> LogitRules:
    return LogitRules(
        SamplingParams(**params), list(prompt), vocab_size=VOCAB_SIZE, eos_token_ids=EOS, tokenizer=CharTokenizer()
    )


def apply(rules, edits, logits) -> np.ndarray:
    """The logits that a token is drawn from, as the backend makes them of one row."""
    logits = logits.astype(np.float32)[None].copy()
    if rules.allowed_mask is not None:
        sampling_reference.keep_allowed(logits, np.zeros(1, np.int32), rules.allowed_mask[None], VOCAB_SIZE)
    assert len(np.unique(edits["token"])) == len(edits)
    assert (edits["row"] == 0).all()
    sampling_reference.edit_logits(logits, edits)
    return logits[0]


PARAMS = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "presence_penalty": -0.5},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.4},
    {"presence_penalty": 0.5, "frequency_penalty": -0.75, "repetition_penalty": 2},
    {"logit_bias": {5: 3.5, 17: -2, 39: 100}},
    {"logit_bias": {5: 3.5, 0: 1, 17: -INF, 38: -100}, "repetition_penalty": 1.5, "frequency_penalty": 0.1},
    {"min_tokens": 6, "stop_token_ids": [17, 5]},
    {"min_tokens": 9, "stop_token_ids": [17], "logit_bias": {0: 4, 17: 2}, "presence_penalty": 1},
    {"bad_words": ["a", "aba", "ab q"], "repetition_penalty": 1.2},
    {"allowed_token_ids": [10, 11, 12, 0, 39], "frequency_penalty": 0.3, "min_tokens": 3},
    {
        "allowed_token_ids": list(range(1, 40, 2)), "bad_words": [" b", "bb"], "min_tokens": 4, "logit_bias": {11: 9},
        "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3, "stop_token_ids": [11],
    },
]  # fmt: skip
BAD_WORD_TOKENS = {
    ("a", "aba", "ab q"): [[10], [36, 10], [10, 11, 10], [36, 10, 11, 10], [10, 11, 37], [36, 10, 11, 37]],
    (" b", "bb"): [[11], [36, 11], [11, 11], [36, 11, 11]],
}


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_edits_match_the_formulas_as_the_output_grows(params):
    rng = np.random.default_rng(0)
    prompt = [5, 10, 5, 12, 39]
    params = {"max_tokens": None, **params}
    bad_words = BAD_WORD_TOKENS[tuple(params["bad_words"])] if "bad_words" in params else ()
    rules = rules_of(prompt, **params)
    assert LogitRules.asked_by(rules.params)
    edits, output, changed = LogitEdits(rules), [], 0
    for _ in range(60):
        logits = rng.normal(0, 5, VOCAB_SIZE).astype(np.float32)
        actual = apply(rules, edits.after([*prompt, *output]), logits)
        expected = expected_logits(logits, prompt, output, rules.params, EOS, bad_words)
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6)
        changed += (actual != logits).any()
        output.append(int(rng.choice([10, 11, 12, 37, 36, rng.integers(VOCAB_SIZE)])))
    assert changed > 5


def test_a_new_set_of_edits_catches_up_with_an_output():
    """As for a sequence that is forked off another."""
    prompt, output = [5, 6], [10, 11, 10, 38, 0, 11, 10]
    rules = rules_of(prompt, repetition_penalty=1.3, frequency_penalty=0.5, logit_bias={38: 2}, max_tokens=None)
    grown = LogitEdits(rules)
    for n in range(len(output)):
        grown.after(prompt + output[:n])
    logits = np.random.default_rng(0).normal(0, 5, VOCAB_SIZE)
    expected = apply(rules, grown.after(prompt + output), logits)
    assert (apply(rules, LogitEdits(rules).after(prompt + output), logits) == expected).all()
    assert not np.allclose(expected, logits)
    assert (rules.first_edits["penalty"] == 0).all()  # a sequence's counts are its own


def test_edits_of_several_rows_say_their_row():
    logits = np.random.default_rng(0).normal(0, 5, (5, VOCAB_SIZE)).astype(np.float32)
    bias, nothing, bans = rules_of(logit_bias={3: 1, 9: 2}), rules_of(logit_bias={}), rules_of(min_tokens=3)
    parts = [LogitEdits(rules).after([5]) for rules in (bias, nothing, bans)]
    batch = EditsOfRows()
    edits = batch.join(parts)
    assert edits["row"].tolist() == [0, 0, 2, 2]
    assert all((part["row"] == 0).all() for part in parts)
    actual = logits.copy()
    sampling_reference.edit_logits(actual, edits)
    expected = logits.copy()
    expected[0, [3, 9]] += [1, 2]
    expected[2, list(EOS)] = -INF
    assert (actual == expected).all()
    assert batch.join([]).shape == batch.join([parts[1]]).shape == (0,)
    assert batch.join([parts[2]])["token"].tolist() == parts[2]["token"].tolist()


def test_nothing_is_asked_by_other_parameters():
    params = SamplingParams(temperature=0.3, top_k=3, top_p=0.5, min_p=0.1, seed=3, stop=["a"], stop_token_ids=[4])
    assert not LogitRules.asked_by(params)
    assert not LogitRules.asked_by(SamplingParams(logit_bias={}, bad_words=[]))
    assert LogitRules.asked_by(SamplingParams(allowed_token_ids=[3]))


def test_the_prompt_counts_for_repetition_only():
    logits = np.full(VOCAB_SIZE, 2.0)
    penalized = apply(rules := rules_of([5, 6], presence_penalty=1), LogitEdits(rules).after([5, 6]), logits)
    assert (penalized == 2).all()
    repeated = apply(rules := rules_of([5, 6], repetition_penalty=4), LogitEdits(rules).after([5, 6]), logits)
    assert np.flatnonzero(repeated != 2).tolist() == [5, 6]
    assert repeated[5] == 0.5


def test_a_bad_word_does_not_begin_in_the_prompt():
    rules = rules_of([10, 11], bad_words=["aba"], max_tokens=None)
    assert rules.forbidden([10, 11]) == set()
    assert rules.forbidden([10, 11, 10, 11]) == {10}
    assert rules.forbidden([10, 11, 10]) == set()


def test_bad_words_are_spelled_with_and_without_a_space():
    assert rules_of(bad_words=["q"]).bad_words == [[26], [37]]
    assert rules_of(bad_words=["   q", "q"]).bad_words == [[26], [37]]
    assert rules_of(bad_words=["ab"]).bad_words == [[10, 11], [36, 10, 11]]
    assert rules_of(bad_words=" ").bad_words == [[36]]


def test_bad_words_need_tokens():
    class NoTokens:
        def encode(self, text, add_special_tokens):
            return []

    with pytest.raises(ValueError, match=r"^bad_words: 'x' has no tokens$"):
        LogitRules(SamplingParams(bad_words=["x"]), [5], vocab_size=VOCAB_SIZE, tokenizer=NoTokens())
    with pytest.raises(ValueError, match=r"^bad_words need a tokenizer"):
        LogitRules(SamplingParams(bad_words=["x"]), [5], vocab_size=VOCAB_SIZE)


def test_stop_token_ids_outside_the_vocabulary_are_never_drawn_anyway():
    rules = rules_of(min_tokens=2, stop_token_ids=[VOCAB_SIZE, 39])
    assert rules.forbidden([5]) == {*EOS, 39}
    assert rules.forbidden([5, 1, 1]) == set()


@pytest.mark.parametrize("params", [{"logit_bias": {40: 1.0}}, {"allowed_token_ids": [3, 40]}])
def test_ids_outside_the_vocabulary_are_named(params):
    with pytest.raises(ValueError, match=rf"^{next(iter(params))}: token ids must be in \[0, 40\); got 40$"):
        rules_of(**params)


def test_biases_beyond_float32_are_infinite():
    rules = rules_of(logit_bias={7: 1e300, 8: -1e300})
    actual = apply(rules, LogitEdits(rules).after([5]), np.zeros(VOCAB_SIZE))
    assert (actual[7], actual[8]) == (INF, -INF)


@pytest.mark.parametrize("vocab_size", [1, 32, 33, 100])
def test_the_mask_has_a_bit_for_each_allowed_id(vocab_size):
    allowed = [0, vocab_size - 1, vocab_size // 2]
    rules = LogitRules(SamplingParams(allowed_token_ids=allowed), [0], vocab_size=vocab_size)
    assert rules.allowed_mask.dtype == np.uint32
    assert len(rules.allowed_mask) == -(-vocab_size // 32)
    bits = [int(word) >> bit & 1 for word in rules.allowed_mask for bit in range(32)]
    assert {i for i, bit in enumerate(bits) if bit} == set(allowed)
