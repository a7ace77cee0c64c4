import math
from dataclasses import replace

import pytest

from cupaged.config import EngineConfig
from cupaged.sampling_params import MAX_LOGPROBS, SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 1.0),
        ("best_of", 0),
        ("best_of", "2"),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", None),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_k", True),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.0),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.0),
        ("logprobs", -1),
        ("logprobs", MAX_LOGPROBS + 1),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", MAX_LOGPROBS + 1),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("min_tokens", -1),
        ("min_tokens", 1.0),
        ("min_tokens", 17),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-7),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", None),
        ("presence_penalty", 2.1),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", "1"),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: math.inf}),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", {5: None}),
        ("logit_bias", [5]),
        ("bad_words", ["a", ""]),
        ("bad_words", [1]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("allowed_token_ids", ["a"]),
        ("logits_processors", [1]),
        ("logits_processors", print),
    ],
)
def test_nonsense_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*; got ") as error:
        SamplingParams(**{name: value})
    assert "\n" not in str(error.value)


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.seed, params.logprobs, params.prompt_logprobs) == (16, None, None, None)
    assert (params.stop, params.stop_token_ids) == ((), ())
    assert params.detokenize
    assert params.skip_special_tokens
    assert not params.ignore_eos
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (params.logit_bias, params.allowed_token_ids, params.bad_words, params.min_tokens) == (None, None, (), 0)


def test_edges_that_make_sense():
    SamplingParams(temperature=0, top_p=1, min_p=1, top_k=-1, max_tokens=None, seed=2**64 - 1, logprobs=0)
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[3]).stop_token_ids == (3,)
    SamplingParams(min_tokens=16, presence_penalty=-2, frequency_penalty=2, repetition_penalty=1e-6)
    SamplingParams(min_tokens=10**9, max_tokens=None, logit_bias={0: -math.inf, 1: 100})
    assert SamplingParams(bad_words="a", allowed_token_ids=[3]).bad_words == ("a",)


def test_parameters_can_be_compared_and_hashed():
    params = SamplingParams(
        logit_bias={3: 1.0}, stop=["a"], bad_words=["b"], allowed_token_ids=[1], logits_processors=[print]
    )
    assert replace(params) == params
    assert hash(replace(params)) == hash(params)
    assert replace(params, logit_bias={3: 2.0}) != params


def test_stop_strings_need_text():
    with pytest.raises(ValueError, match="detokenize must be True when stop strings are given"):
        SamplingParams(stop="a", detokenize=False)


@pytest.mark.parametrize(
    ("fields", "greedy"),
    [({"temperature": 0}, True), ({"temperature": 1e-6}, True), ({"top_k": 1}, True), ({"temperature": 0.01}, False)],
)
def test_greedy(fields, greedy):
    assert SamplingParams(**fields).greedy is greedy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device", "gpu"),
        ("dtype", "fp16"),
        ("block_size", 12),
        ("max_model_len", 1),
        ("max_model_len", 2.0),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 0),
        ("gpu_memory_utilization", 0),
        ("gpu_memory_utilization", 1.1),
        ("gpu_memory_utilization", math.nan),
        ("kv_cache_memory_bytes", 0),
        ("kv_cache_memory_bytes", 1e9),
        ("seed", "x"),
    ],
)
def test_engine_options_that_make_no_sense_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*; got "):
        EngineConfig(**{name: value})


def test_best_of_draws_at_least_n():
    assert (SamplingParams(n=3).num_sequences, SamplingParams(n=3).picks_best) == (3, False)
    assert (SamplingParams(n=2, best_of=5).num_sequences, SamplingParams(n=2, best_of=5).picks_best) == (5, True)
    assert not SamplingParams(n=2, best_of=2).picks_best
    assert SamplingParams(n=2, best_of=5).num_logprobs == 0
    assert SamplingParams(n=2, best_of=5, logprobs=3).num_logprobs == 3
    assert SamplingParams(n=2).num_logprobs is None
    with pytest.raises(ValueError, match="best_of must be an integer >= n=3, or None; got 2"):
        SamplingParams(n=3, best_of=2)
