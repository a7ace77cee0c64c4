"""Beam search on the tiny models: the whole engine against a search without a cache, and against transformers."""

from pathlib import Path

import numpy as np
import pytest
from beam_reference import beam_search

from cupaged.config import EngineConfig
from cupaged.engine.engine import Engine
from cupaged.models.decoder import Decoder
from cupaged.sampling_params import BeamSearchParams, SamplingParams
from cupaged.weights.checkpoint import Checkpoint
from cupaged.weights.packing import load_weights

GOLDEN = Path(__file__).parent / "golden"
EOS = 2
NUM_TOKENS = 14
MIN_GAP = 1e-4  # the models' logits are float32: see MIN_MARGIN in make_golden.py


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen3"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name, backend):
    checkpoint = Checkpoint(GOLDEN / name)
    return checkpoint.config, load_weights(checkpoint.tensors, checkpoint.config, backend)


@pytest.fixture(scope="module")
def prompts(name):
    with np.load(GOLDEN / f"{name}.npz") as golden:
        return [p.tolist() for p in np.split(golden["prompts"], np.cumsum(golden["lengths"])[:-1])]


@pytest.fixture(scope="module")
def logits_after(model, new_driver):
    """logits_after(token_ids) [vocab_size] float64: the sequence is computed as a whole, nothing is kept."""
    driver, known = new_driver(model), {}

    def logits_after(token_ids):
        key = tuple(token_ids)
        if key not in known:
            sequence = driver.new_sequence()
            [logits] = driver.step((sequence, list(token_ids)))
            known[key] = logits.astype(np.float64)
            driver.finish(sequence)
        return known[key]

    return logits_after


@pytest.fixture
def new_engine(model, backend):
    config, weights = model

    def new_engine(max_num_batched_tokens=64, num_blocks=128, **options):
        sizes = {"max_num_batched_tokens": max_num_batched_tokens, "max_num_seqs": 32, "max_model_len": 128}
        decoder = Decoder(
            config, weights, backend, max_num_tokens=max_num_batched_tokens, max_num_logits=32, max_model_len=128
        )
        bytes_per_block = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4 * 8
        engine_config = EngineConfig(
            block_size=8, kv_cache_memory_bytes=num_blocks * bytes_per_block, debug=True, **sizes, **options
        )
        return Engine(engine_config, config, decoder, backend)

    return new_engine


def run(engine, *, preempt_every=None):
    outputs, num_steps = {}, 0
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step() if output.finished}
        num_steps += 1
        if preempt_every and num_steps % preempt_every == 0 and len(engine.scheduler.running) > 1:
            engine.scheduler.preempt(engine.scheduler.running[-1])
    assert engine.stats().num_used_blocks == 0
    assert engine.audit() == []
    return outputs


def reference(logits_after, prompt, params):
    found, gap = beam_search(
        logits_after,
        prompt,
        params.beam_width,
        params.max_tokens,
        stop_token_ids=() if params.ignore_eos else (EOS, *params.stop_token_ids),
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
    )
    return found, gap


def assert_found(output, found):
    assert [c.token_ids for c in output.outputs] == [f.token_ids for f in found]
    for completion, wanted in zip(output.outputs, found, strict=True):
        assert completion.cumulative_logprob == pytest.approx(sum(wanted.logprobs), abs=1e-4)


# Stop tokens that the random models like, so that searches end in all ways.
STOPS = tuple(range(100, 110))


def searches(logits_after, prompts, widths):
    """(prompt, params, what the reference finds), without those that hang on the models' noise."""
    cases = []
    for i, width in enumerate(widths):
        prompt = prompts[i % len(prompts)]
        kinds = (
            BeamSearchParams(width, NUM_TOKENS, stop_token_ids=STOPS),
            BeamSearchParams(width, NUM_TOKENS, stop_token_ids=STOPS, early_stopping="never", length_penalty=0.5),
            BeamSearchParams(width, NUM_TOKENS, ignore_eos=True),
        )
        for params in (kinds[i % 3], kinds[(i + 1) % 3]):
            found, gap = reference(logits_after, prompt, params)
            if gap > MIN_GAP:
                cases.append((prompt, params, found))
    assert len(cases) >= 1.5 * len(widths)
    return cases


def test_class_34_widths_2_to_8_alone_in_batches_in_chunks_and_preempted(new_engine, prompts, logits_after):
    cases = searches(logits_after, prompts, range(2, 9))
    assert len({len(f.token_ids) for _, _, found in cases for f in found}) >= 4  # ended by tokens and by length
    for prompt, params, found in cases:
        engine = new_engine()
        engine.add_request("x", prompt, params)
        assert_found(run(engine)["x"], found)
    for options, preempt_every in [
        ({}, None),
        ({"max_num_batched_tokens": 9}, None),
        ({"max_num_batched_tokens": 33, "enable_prefix_caching": False}, 4),
        ({"num_blocks": 60}, 3),
    ]:
        engine, added = new_engine(**options), []
        for i, (prompt, params, found) in enumerate(cases):
            if params.beam_width <= engine.scheduler.max_num_seqs:
                engine.add_request(f"beams {i}", prompt, params)
                engine.add_request(f"greedy {i}", prompt, SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
                added.append((i, found))
        outputs = run(engine, preempt_every=preempt_every)
        assert (engine.stats().num_preemptions > 0) >= (preempt_every is not None)
        for i, found in added:
            assert_found(outputs[f"beams {i}"], found)


@pytest.mark.oracle
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_transformers_finds_the_same(name, new_engine, prompts, logits_after, early_stopping):
    torch = pytest.importorskip("torch", reason="only the comparison with transformers needs torch")
    transformers = pytest.importorskip("transformers", reason="only the comparison with transformers needs it")
    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32).eval()
    num_compared = 0
    for width, length_penalty, prompt in [
        (2, 1.0, prompts[0]), (3, 0.0, prompts[1]), (4, 2.0, prompts[2]), (5, 1.0, prompts[4]), (8, -1.0, prompts[1]),
    ]:  # fmt: skip
        params = BeamSearchParams(
            width, NUM_TOKENS, stop_token_ids=STOPS, length_penalty=length_penalty, early_stopping=early_stopping
        )
        if reference(logits_after, prompt, params)[1] <= MIN_GAP:
            continue
        engine = new_engine()
        engine.add_request("x", prompt, params)
        output = run(engine)["x"]
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=width, num_return_sequences=width, do_sample=False,
            max_new_tokens=NUM_TOKENS, length_penalty=length_penalty, early_stopping=early_stopping, pad_token_id=1,
            eos_token_id=[EOS, *STOPS], return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        for completion, tokens, score in zip(
            output.outputs, theirs.sequences[:, len(prompt) :].tolist(), theirs.sequences_scores.tolist(), strict=True
        ):
            length = len(completion.token_ids)
            assert tokens[:length] == completion.token_ids
            assert set(tokens[length:]) <= {1}
            assert score == pytest.approx(completion.cumulative_logprob / length**length_penalty, rel=1e-4)
        num_compared += 1
    assert num_compared >= 3
