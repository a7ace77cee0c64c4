"""The same request gives the same tokens and log probabilities on the tiny models: shared, cached, chunked, preempted,
beside 63 others or alone.

tests/gpu runs the first of these on a GPU, with fixtures of its own.
"""

import functools
from dataclasses import replace

import model_tools
import numpy as np
import pytest
from fake_model import preempt
from model_tools import golden

from cupaged.sampling_params import SamplingParams

BLOCK_SIZE = 8
CHUNKS = [1, 3, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 256]
LOGPROB_ERROR = 1e-5  # of 1 + |log probability|: float32 sums in another order
GOLDEN_ERROR = 2e-4  # twice what the tiny models' logits may be off from those of transformers


@pytest.fixture(scope="module", params=["llama", "mistral"])  # mistral has a sliding window
def name(request):
    return request.param


@pytest.fixture
def new_engine(name, backend):
    def new(*, max_num_batched_tokens=256, num_blocks=64, **options):
        sizes = {"max_num_tokens": max_num_batched_tokens, "num_blocks": num_blocks, "max_model_len": 120}
        return model_tools.new_engine(name, backend, **sizes, **options, debug=True)

    return new


@pytest.fixture
def assert_right(new_engine):
    """assert_right(prompt, params, output): its completions are those of requests that ran alone."""

    @functools.cache
    def alone(prompt, params):
        engine = new_engine(enable_prefix_caching=False)
        engine.add_request("x", prompt, params)
        return run(engine)["x"].outputs[0]

    def assert_right(prompt, params, output):
        assert [completion.index for completion in output.outputs] == list(range(params.n))
        for completion in output.outputs:
            single = replace(params, n=1, seed=params.seed + completion.index)
            assert_same(completion, alone(tuple(prompt), single))

    return assert_right


def drawn(n=1, seed=11, max_tokens=12):
    return SamplingParams(n=n, seed=seed, max_tokens=max_tokens, ignore_eos=True, logprobs=2)


def scoring(n=1, max_tokens=4):
    return SamplingParams(n=n, seed=11, max_tokens=max_tokens, ignore_eos=True, prompt_logprobs=2, logprobs=2)


def prompt_of(length, salt=0):
    return np.random.default_rng(salt).integers(3, 300, length).tolist()


def run(engine, preempt_every=0):
    last, num_steps = {}, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            last[output.request_id] = output
        num_steps += 1
        if preempt_every and num_steps % preempt_every == 0 and len(engine.scheduler.running) > 1:
            preempt(engine, engine.scheduler.running[-1])
    return last


def assert_same(completion, expected):
    assert completion.token_ids == expected.token_ids
    for entry, wanted in zip(completion.logprobs, expected.logprobs, strict=True):
        for token_id in entry.keys() & wanted.keys():
            value = wanted[token_id].logprob
            assert abs(entry[token_id].logprob - value) <= LOGPROB_ERROR * (1 + abs(value))


def test_a_request_alone_and_beside_63_others(new_engine, assert_right):
    """Of all lengths and temperatures, that come and go while it runs."""
    engine = new_engine(max_num_seqs=64, num_blocks=1024)
    requests = {
        str(i): (
            prompt_of(1 + i % 40, salt=i),
            replace(drawn(seed=i, max_tokens=5 + i % 20), temperature=0.5 * (i % 3)),
        )
        for i in range(64)
    }
    for request_id, request in requests.items():
        engine.add_request(request_id, *request)
    outputs = run(engine)
    assert engine.stats().num_steps < 40  # together
    for request_id, request in requests.items():
        assert_right(*request, outputs[request_id])


@pytest.mark.parametrize("chunk", CHUNKS)
def test_n_outputs_are_those_of_n_requests(new_engine, assert_right, chunk):
    prompts = [prompt_of(length, length) for length in (1, 7, 8, 9, 31)]
    engine = new_engine(max_num_batched_tokens=max(chunk, 3))
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, drawn(n=3))
    outputs = run(engine)
    assert engine.stats().num_copies == 2 * 4  # but for the prompt of a full block
    for i, prompt in enumerate(prompts):
        assert_right(prompt, drawn(n=3), outputs[str(i)])


def test_a_prefix_that_is_found_at_every_length_of_a_prompt(new_engine, assert_right):
    base = prompt_of(3 * BLOCK_SIZE + 1)
    engine = new_engine()
    engine.add_request("base", base, drawn())
    run(engine)
    for common in range(len(base) + 1):
        prompt = base[:common] + prompt_of(5, salt=common + 100)
        engine.add_request("x", prompt, drawn())
        output = run(engine)["x"]
        assert output.num_cached_tokens == common // BLOCK_SIZE * BLOCK_SIZE
        assert_right(prompt, drawn(), output)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_class_24_hits_in_chunks_of_any_size(new_engine, assert_right, chunk):
    base = prompt_of(4 * BLOCK_SIZE)
    engine = new_engine(max_num_batched_tokens=chunk)
    for length in (BLOCK_SIZE, 2 * BLOCK_SIZE + 3, 4 * BLOCK_SIZE - 1, 4 * BLOCK_SIZE):
        prompt = base[:length] + prompt_of(length % 7, salt=length)
        for seed in (3, 4):
            engine.add_request(str(seed), prompt, drawn(seed=seed))
        outputs = run(engine)
        for seed in (3, 4):
            assert_right(prompt, drawn(seed=seed), outputs[str(seed)])
    assert engine.stats().num_cached_tokens > 0


@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_forced_preemption_every_few_steps(new_engine, assert_right, every, caching, mode):
    prompts = [prompt_of(length, length) for length in (5, 16, 27)]
    engine = new_engine(
        max_num_batched_tokens=16, enable_prefix_caching=caching, preemption_mode=mode, swap_space_bytes=1 << 20
    )
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, drawn(n=1 + i % 2))
    outputs = run(engine, preempt_every=every)
    stats = engine.stats()
    assert stats.num_preemptions > 0
    if mode == "recompute":
        assert stats.num_swaps == 0
    else:  # all, but for those that have computed nothing yet
        assert stats.num_swaps >= 0.9 * stats.num_preemptions
    for i, prompt in enumerate(prompts):
        assert_right(prompt, drawn(n=1 + i % 2), outputs[str(i)])


@pytest.fixture(scope="module")
def golden_prompt(name):
    """A prompt, and the log probabilities after each of its tokens, from transformers' logits."""
    logits, prompt = golden(name)["logits"].astype(np.float64), golden(name)["prompts"][-1]
    assert logits.shape == (len(prompt), 300)
    assert logits.std() > 2
    logits -= logits.max(axis=1, keepdims=True)
    return prompt, logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def assert_golden(prompt_logprobs, golden_prompt):
    prompt, expected = golden_prompt
    assert prompt_logprobs[0] is None
    assert len(prompt_logprobs) == len(prompt)
    for token_id, entry, row in zip(prompt[1:], prompt_logprobs[1:], expected, strict=False):
        assert set(entry) == {token_id, *np.argsort(-row)[:2].tolist()}
        for i, logprob in entry.items():
            assert abs(logprob.logprob - row[i]) <= GOLDEN_ERROR
            assert logprob.rank == 1 + (row > row[i]).sum()


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("caching", [False, True])
def test_class_26_prompt_logprobs_are_those_of_transformers(new_engine, golden_prompt, chunk, caching):
    """Of requests with one output and with several, beside others; the prompt is in the cache the second time."""
    prompt, _ = golden_prompt
    engine = new_engine(max_num_batched_tokens=chunk, enable_prefix_caching=caching)
    for _ in range(2):
        engine.add_request("plain", prompt, drawn(max_tokens=2))
        engine.add_request("one", prompt, scoring())
        if chunk >= 3:
            engine.add_request("three", prompt, scoring(n=3))
        engine.add_request("other", prompt_of(20), scoring())
        outputs = run(engine)
        assert outputs["plain"].prompt_logprobs is None
        assert len(outputs["other"].prompt_logprobs) == 20
        for output in (outputs[name] for name in ("one", "three") if name in outputs):
            assert_golden(output.prompt_logprobs, golden_prompt)
            assert_same(output.outputs[0], outputs["one"].outputs[0])
    assert (engine.stats().num_cached_tokens > 0) is caching


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_class_26_prompt_logprobs_of_preempted_prompts(new_engine, golden_prompt, every, mode):
    engine = new_engine(max_num_batched_tokens=12, preemption_mode=mode, swap_space_bytes=1 << 20)
    for name in "abc":
        engine.add_request(name, golden_prompt[0], scoring(n=2))
    outputs = run(engine, preempt_every=every)
    assert engine.stats().num_preemptions > 0
    for name in "abc":
        assert_golden(outputs[name].prompt_logprobs, golden_prompt)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_class_26_generated_tokens_have_the_same_logprobs_as_a_prompt(new_engine, chunk):
    prompt = prompt_of(19)
    engine = new_engine(enable_prefix_caching=False)
    engine.add_request("x", prompt, drawn(max_tokens=30))
    [expected] = run(engine)["x"].outputs
    engine = new_engine(max_num_batched_tokens=chunk)
    engine.add_request("x", prompt + expected.token_ids, scoring())
    entries = run(engine)["x"].prompt_logprobs[len(prompt) :]
    for entry, wanted in zip(entries, expected.logprobs, strict=True):
        assert entry.keys() == wanted.keys()
        for token_id, logprob in wanted.items():
            assert entry[token_id].rank == logprob.rank
            assert abs(entry[token_id].logprob - logprob.logprob) <= LOGPROB_ERROR * (1 + abs(logprob.logprob))
