"""Requests with penalties, biases and forbidden tokens through the whole engine, on the fake model: each answer is the
formula's, applied to the model's logits token by token.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from fake_model import (
    EOS,
    VOCAB_SIZE,
    FakeBackend,
    drawn_token,
    expected_output,
    make_engine,
    most_likely_token,
    run_all,
)
from logit_formulas import expected_logits

from cupaged.engine import sampler
from cupaged.sampling_params import SamplingParams

# The model gives its most likely token a logit of 1 and all others 0.
LOG_SUM = math.log(math.e + VOCAB_SIZE - 1)
TOKENS_OF_CHARACTERS = {"a": [7], "ab": [7, 8], " a": [9], " ab": [9, 8]}


class CharTokenizer:
    """Token i is character i from "A" on; TOKENS_OF_CHARACTERS says how bad words are spelled."""

    vocab_size = VOCAB_SIZE

    def encode(self, text, add_special_tokens=True):
        return list(TOKENS_OF_CHARACTERS[text])

    def decode(self, token_ids, skip_special_tokens=True):
        return "".join(chr(ord("A") + i) for i in token_ids)

    def decoder(self, skip_special_tokens=True):
        class Decoder:
            def push(self, token_id):
                return chr(ord("A") + token_id)

            def flush(self):
                return ""

        return Decoder()


def formula_output(prompt, params: SamplingParams) -> list[int]:
    bad_words = [TOKENS_OF_CHARACTERS[text] for word in params.bad_words for text in (word, f" {word}")]
    output = []
    while len(output) < params.max_tokens:
        logits = np.zeros(VOCAB_SIZE)
        logits[most_likely_token(prompt + output)] = 1
        best = int(np.argmax(expected_logits(logits, prompt, output, params, (EOS,), bad_words)))
        output.append(best if params.greedy else drawn_token(best, params.seed, len(output)))
        if output[-1] == EOS and not params.ignore_eos:
            break
    return output


def params_of(**fields) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 25, "ignore_eos": True, **fields})


def prefer_the_next(output, logits):
    """In place: whatever comes after the last token by number gets likelier."""
    logits[(output[-1] + 1) % VOCAB_SIZE if output else 5] += 2
    return logits


def no_multiples_of_three(output, logits):
    return np.where(np.arange(VOCAB_SIZE) % 3 == 0, np.float32(-5), logits)


PARAMS = [
    params_of(),
    params_of(repetition_penalty=1.7, logit_bias={3: 0.8, 7: 0.7}),
    params_of(presence_penalty=1.5, frequency_penalty=0.3),
    params_of(frequency_penalty=-2, logprobs=2),  # once drawn, drawn forever
    params_of(logit_bias={3: 0.9, 7: 0.8, EOS: -3}, repetition_penalty=1.3, logprobs=0),
    params_of(min_tokens=15, ignore_eos=False, logit_bias={EOS: 0.99}),
    params_of(min_tokens=9, ignore_eos=False, logprobs=1, logit_bias={EOS: 2}),
    params_of(allowed_token_ids=[3, 5, 33, 34, 49], presence_penalty=1),
    params_of(allowed_token_ids=[7, 8, 9, 0], bad_words=["ab", "a"], logprobs=3),
    params_of(bad_words=["ab"], logit_bias={7: 0.5, 8: 2, 9: 0.2}, frequency_penalty=0.1),
    params_of(temperature=1, seed=5, repetition_penalty=1.5, frequency_penalty=1.2),
    params_of(temperature=1, seed=6, logprobs=1),
    params_of(logits_processors=[prefer_the_next]),
    params_of(logits_processors=[no_multiples_of_three, prefer_the_next], logprobs=2, frequency_penalty=1.2),
    params_of(
        temperature=1, seed=8, logits_processors=[prefer_the_next, no_multiples_of_three], bad_words=["ab"],
        logit_bias={6: 5.5, 7: 2}, min_tokens=3, logprobs=0,
    ),
]  # fmt: skip


CONFIGS = [{"num_blocks": 128}, {"max_num_batched_tokens": 7}, {"num_blocks": 20}, {"max_num_seqs": 3}]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("rows_per_copy", [1, 3, 100])
def test_answers_are_those_of_the_formula(config, rows_per_copy, monkeypatch):
    monkeypatch.setattr(sampler, "COPY_BYTES", rows_per_copy * 4 * VOCAB_SIZE)
    engine = make_engine(tokenizer=CharTokenizer(), **config)
    prompts = [[(7 * j + i) % VOCAB_SIZE for j in range(3 + 2 * i)] for i in range(len(PARAMS))]
    for i in np.random.default_rng(0).permutation(len(PARAMS)).tolist():
        engine.add_request(str(i), prompts[i], PARAMS[i])
    outputs = run_all(engine)
    assert (engine.stats().num_preemptions > 0) is (config == {"num_blocks": 20})
    plain = 0
    for i, (prompt, params) in enumerate(zip(prompts, PARAMS, strict=True)):
        completion = outputs[str(i)].outputs[0]
        assert completion.token_ids == formula_output(prompt, params), params
        plain += completion.token_ids == expected_output(prompt, 25, seed=params.seed, ignore_eos=params.ignore_eos)
        if params.logprobs is not None:  # of the raw logits
            for n, (token, entries) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
                likely = token == most_likely_token(prompt + completion.token_ids[:n])
                assert entries[token].logprob == pytest.approx(likely - LOG_SUM, abs=1e-6)
                assert entries[token].rank == (1 if likely else 2)
    assert plain == 2  # the two requests that ask for nothing


def test_processors_get_the_output_the_prompt_and_the_raw_logits():
    calls = []

    class WithPrompt:
        def __call__(self, prompt_token_ids, output_token_ids, logits):
            calls.append((prompt_token_ids, output_token_ids, logits.copy()))
            assert (type(logits), logits.dtype, logits.shape) == (np.ndarray, np.float32, (VOCAB_SIZE,))
            return logits

    engine = make_engine(max_num_batched_tokens=2)
    params = params_of(
        n=2, temperature=1, seed=4, max_tokens=4, logits_processors=(WithPrompt(),), logit_bias={3: 100}, logprobs=0
    )
    engine.add_request("x", [1, 2, 3], params)
    outputs = [completion.token_ids for completion in run_all(engine)["x"].outputs]
    assert outputs[0] != outputs[1]
    assert len(calls) == 8
    for prompt, output, logits in calls:
        assert prompt == [1, 2, 3]
        assert output in [tokens[:i] for tokens in outputs for i in range(4)]
        expected = np.zeros(VOCAB_SIZE)
        expected[most_likely_token(prompt + output)] = 1
        assert (logits == expected).all()


def test_a_processor_that_is_called_once_a_token_though_preempted():
    """What it keeps of the calls before is therefore right."""
    num_calls = 0

    def count(output, logits):
        nonlocal num_calls
        num_calls += 1
        return logits

    engine = make_engine(num_blocks=12)
    for name in "ab":
        engine.add_request(name, list(range(30)), params_of(max_tokens=30, logits_processors=[count]))
    run_all(engine)
    assert engine.stats().num_preemptions > 0
    assert num_calls == 60


def fail_later(output, logits):
    if len(output) == 3:
        raise KeyError("a bug")
    return logits


@pytest.mark.parametrize(
    ("processor", "num_tokens", "message"),
    [
        (fail_later, 3, "logits_processors[1] raised KeyError: 'a bug'"),
        (lambda output, logits: None, 0, "logits_processors[1] must return numpy.ndarray (50,) float32, C-contiguous; "
         "got NoneType"),
        (lambda output, logits: logits[1:], 0, "logits_processors[1] must return numpy.ndarray (50,) float32, "
         "C-contiguous; got numpy.ndarray (49,) float32"),
        (lambda output, logits: logits * 1.0 if output else logits.astype(float), 0, "got numpy.ndarray (50,) float64"),
        (lambda output, logits: np.stack([logits] * 2, 1)[:, 0], 0, "C-contiguous; got numpy.ndarray (50,) float32"),
        (lambda logits: logits, 0, "logits_processors[1] raised TypeError"),
        (lambda output, logits: logits - np.inf, 0, "no finite logit after 3 tokens, or none to a token that "
         "logits_processors"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_failing_processor_ends_its_own_output_only(processor, num_tokens, message, logprobs):
    engine = make_engine()
    good = params_of(logits_processors=[prefer_the_next], logprobs=logprobs)
    engine.add_request("good", [1, 2, 3], good)
    engine.add_request("bad", [1, 2, 3], replace(good, logits_processors=[prefer_the_next, processor]))
    engine.add_request("plain", [1, 2, 3], params_of())
    outputs = run_all(engine)
    failed = outputs["bad"].outputs[0]
    assert failed.finish_reason == "error"
    assert message in failed.error
    assert "\n" not in failed.error
    expected = formula_output([1, 2, 3], good)
    assert failed.token_ids == expected[:num_tokens]
    if logprobs is not None:
        assert len(failed.logprobs) == num_tokens
    assert outputs["good"].outputs[0].token_ids == expected
    assert outputs["plain"].outputs[0].token_ids == expected_output([1, 2, 3], 25, ignore_eos=True)


def test_a_processor_that_fails_for_one_of_several_outputs():
    engine = make_engine()

    def fail_after(output, logits):
        if output[:1] == first:
            raise RuntimeError("not this one")
        return logits

    params = params_of(n=3, temperature=1, seed=3, max_tokens=6)
    engine.add_request("x", [1, 2, 3], params)
    expected = [completion.token_ids for completion in run_all(engine)["x"].outputs]
    first = expected[1][:1]
    assert sum(output[:1] == first for output in expected) == 1
    engine.add_request("x", [1, 2, 3], replace(params, logits_processors=[fail_after]))
    outputs = run_all(engine)["x"].outputs
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    assert [output.token_ids for output in outputs] == [expected[0], first, expected[2]]
    assert outputs[1].error == "logits_processors[0] raised RuntimeError: not this one"


def test_requests_that_ask_for_nothing_cost_nothing(monkeypatch):
    def fail(*args):
        raise AssertionError("not needed")

    for name in ("edit_logits", "keep_allowed", "copy"):
        monkeypatch.setattr(FakeBackend, name, fail)
    engine = make_engine()
    engine.add_request("x", [1, 2, 3], params_of(logprobs=2))
    assert run_all(engine)["x"].outputs[0].token_ids == expected_output([1, 2, 3], 25, ignore_eos=True)


def test_min_tokens_holds_off_stop_token_ids_and_stop_strings():
    tokens = expected_output([1, 2, 3], 25, ignore_eos=True)
    text = CharTokenizer().decode(tokens)
    stop = next(text[i] for i in range(9, 25) if text[i] in text[:8])  # comes early, and again later
    stop_at = text.index(stop, 8)
    engine = make_engine(tokenizer=CharTokenizer())
    engine.add_request("string", [1, 2, 3], params_of(stop=stop, min_tokens=8))
    engine.add_request("token", [1, 2, 3], params_of(stop_token_ids=[tokens[3]], min_tokens=8))
    outputs = run_all(engine)
    by_string, by_token = outputs["string"].outputs[0], outputs["token"].outputs[0]
    assert (by_string.text, by_string.stop_reason) == (text[:stop_at], stop)
    assert by_string.token_ids == tokens[: stop_at + 1]
    assert tokens[3] not in by_token.token_ids[:8]
    assert by_token.token_ids[:3] == tokens[:3]


def test_a_sequence_that_may_draw_nothing_ends_with_an_error_that_says_why():
    engine = make_engine()
    engine.add_request("x", [1, 2, 3], params_of(allowed_token_ids=[EOS], min_tokens=2))
    engine.add_request("y", [1, 2, 3], params_of(allowed_token_ids=[EOS]))
    outputs = run_all(engine)
    failed = outputs["x"].outputs[0]
    assert (failed.finish_reason, failed.token_ids) == ("error", [])
    assert "no finite logit after 3 tokens" in failed.error
    assert "allowed_token_ids" in failed.error
    assert outputs["y"].outputs[0].token_ids == [EOS] * 25


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, r"logit_bias: token ids must be in \[0, 50\); got 50"),
        ({"allowed_token_ids": [1, VOCAB_SIZE + 3]}, r"allowed_token_ids: token ids must be in \[0, 50\); got 53"),
        ({"bad_words": ["a"]}, "bad_words need a tokenizer"),
    ],
)
def test_what_cannot_be_honoured_is_refused(params, message):
    engine = make_engine()
    with pytest.raises(ValueError, match=message):
        engine.add_request("x", [1, 2, 3], params_of(**params))
    assert not engine.has_unfinished_requests()
