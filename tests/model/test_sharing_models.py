"""The same request gives the same tokens and log probabilities on the tiny models: shared, cached, chunked, preempted
or alone."""

from pathlib import Path

import numpy as np
import pytest

from cupaged.config import EngineConfig
from cupaged.engine.engine import Engine
from cupaged.models.decoder import Decoder
from cupaged.sampling_params import SamplingParams
from cupaged.weights.checkpoint import Checkpoint
from cupaged.weights.packing import load_weights

GOLDEN = Path(__file__).parent / "golden"
BLOCK_SIZE = 8
CHUNKS = [1, 3, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 256]
LOGPROB_ERROR = 1e-5  # of 1 + |log probability|: float32 sums in another order


@pytest.fixture(scope="module", params=["llama", "mistral"])  # mistral has a sliding window
def model(request, backend):
    checkpoint = Checkpoint(GOLDEN / request.param)
    return checkpoint.config, load_weights(checkpoint.tensors, checkpoint.config, backend)


@pytest.fixture
def new_engine(model, backend):
    config, weights = model

    def new(*, num_blocks=64, **options):
        sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 120, **options}
        num_tokens = sizes["max_num_batched_tokens"]
        decoder = Decoder(
            config, weights, backend, max_num_tokens=num_tokens, max_num_logits=8, max_model_len=sizes["max_model_len"]
        )
        bytes_per_block = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4 * BLOCK_SIZE
        engine_config = EngineConfig(
            block_size=BLOCK_SIZE, kv_cache_memory_bytes=num_blocks * bytes_per_block, debug=True, **sizes
        )
        return Engine(engine_config, config, decoder, backend)

    return new


def drawn(n=1, seed=11, max_tokens=12):
    return SamplingParams(n=n, seed=seed, max_tokens=max_tokens, ignore_eos=True, logprobs=2)


def prompt_of(length, salt=0):
    return np.random.default_rng(salt).integers(3, 300, length).tolist()


def run(engine, preempt_every=0):
    last, num_steps = {}, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            last[output.request_id] = output
        num_steps += 1
        if preempt_every and num_steps % preempt_every == 0 and len(engine.scheduler.running) > 1:
            engine.scheduler.preempt(engine.scheduler.running[-1])
    return last


def alone(new_engine, prompt, params):
    engine = new_engine(enable_prefix_caching=False)
    engine.add_request("x", prompt, params)
    return run(engine)["x"].outputs[0]


def assert_same(completion, expected):
    assert completion.token_ids == expected.token_ids
    for entry, wanted in zip(completion.logprobs, expected.logprobs, strict=True):
        for token_id in entry.keys() & wanted.keys():
            value = wanted[token_id].logprob
            assert abs(entry[token_id].logprob - value) <= LOGPROB_ERROR * (1 + abs(value))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_n_outputs_are_those_of_n_requests(new_engine, chunk):
    prompts = [prompt_of(length, length) for length in (1, 7, 8, 9, 31)]
    engine = new_engine(max_num_batched_tokens=max(chunk, 3))
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, drawn(n=3))
    outputs = run(engine)
    assert engine.stats().num_copies == 2 * 4  # but for the prompt of a full block
    for i, prompt in enumerate(prompts):
        for completion in outputs[str(i)].outputs:
            assert_same(completion, alone(new_engine, prompt, drawn(seed=11 + completion.index)))


def test_a_prefix_that_is_found_at_every_length_of_a_prompt(new_engine):
    base = prompt_of(3 * BLOCK_SIZE + 1)
    engine = new_engine()
    engine.add_request("base", base, drawn())
    run(engine)
    for common in range(len(base) + 1):
        prompt = base[:common] + prompt_of(5, salt=common + 100)
        engine.add_request("x", prompt, drawn())
        output = run(engine)["x"]
        assert output.num_cached_tokens == common // BLOCK_SIZE * BLOCK_SIZE
        assert_same(output.outputs[0], alone(new_engine, prompt, drawn()))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_class_24_hits_in_chunks_of_any_size(new_engine, chunk):
    base = prompt_of(4 * BLOCK_SIZE)
    engine = new_engine(max_num_batched_tokens=chunk)
    for length in (BLOCK_SIZE, 2 * BLOCK_SIZE + 3, 4 * BLOCK_SIZE - 1, 4 * BLOCK_SIZE):
        prompt = base[:length] + prompt_of(length % 7, salt=length)
        for name in "ab":
            engine.add_request(name, prompt, drawn(seed=3 if name == "a" else 4))
        outputs = run(engine)
        for name, seed in (("a", 3), ("b", 4)):
            assert_same(outputs[name].outputs[0], alone(new_engine, prompt, drawn(seed=seed)))
    assert engine.stats().num_cached_tokens > 0


@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_forced_preemption_every_few_steps(new_engine, every, caching, mode):
    prompts = [prompt_of(length, length) for length in (5, 16, 27)]
    engine = new_engine(
        max_num_batched_tokens=16, enable_prefix_caching=caching, preemption_mode=mode, swap_space_bytes=1 << 20
    )
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, drawn(n=1 + i % 2))
    outputs = run(engine, preempt_every=every)
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_swaps == (stats.num_preemptions if mode == "swap" else 0)
    for i, prompt in enumerate(prompts):
        for completion in outputs[str(i)].outputs:
            assert_same(completion, alone(new_engine, prompt, drawn(seed=11 + completion.index)))
