"""Penalties, biases and forbidden tokens on the tiny models: the whole engine against formulas and transformers."""

from pathlib import Path

import numpy as np
import pytest
from logit_formulas import expected_logits

from cupaged.config import EngineConfig
from cupaged.engine.engine import Engine
from cupaged.models.decoder import Decoder
from cupaged.sampling_params import SamplingParams
from cupaged.weights.checkpoint import Checkpoint
from cupaged.weights.packing import load_weights

GOLDEN = Path(__file__).parent / "golden"
EOS = 2
NUM_TOKENS = 30
MARGIN = 1e-3  # between a step's two largest logits: clear of float32's noise


class WordTokenizer:
    """Words are numbers: "17 3" is the tokens 17 and 3."""

    vocab_size = 300

    def encode(self, text, add_special_tokens):
        return [int(word) for word in text.split()]

    def decode(self, token_ids, skip_special_tokens):
        return " ".join(map(str, token_ids))


@pytest.fixture(scope="module")
def tiny_model(backend):
    checkpoint = Checkpoint(GOLDEN / "llama")
    assert checkpoint.config.eos_token_ids == (EOS,)
    return checkpoint.config, load_weights(checkpoint.tensors, checkpoint.config, backend)


@pytest.fixture(scope="module")
def prompts():
    with np.load(GOLDEN / "llama.npz") as golden:
        return [p.tolist() for p in np.split(golden["prompts"], np.cumsum(golden["lengths"])[:-1])]


@pytest.fixture
def generate(tiny_model, backend):
    """generate(prompts, params) -> the output's tokens, for each; all requests run together."""
    config, weights = tiny_model

    def run(prompts, params):
        sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": 128}
        decoder = Decoder(config, weights, backend, max_num_tokens=32, max_num_logits=8, max_model_len=128)
        engine_config = EngineConfig(block_size=8, kv_cache_memory_bytes=1 << 20, **sizes)
        engine = Engine(engine_config, config, decoder, backend, WordTokenizer())
        for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
            engine.add_request(str(i), prompt, p)
        outputs = {}
        while engine.has_unfinished_requests():
            outputs |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
        return [outputs[str(i)] for i in range(len(prompts))]

    return run


def greedy(**fields) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=NUM_TOKENS, detokenize=False, **fields)


def lift_the_median(output, logits):
    logits[np.argsort(logits)[len(logits) // 2]] += 9
    return logits


def forbid_the_last(output, logits):
    return np.where(np.isin(np.arange(len(logits)), output[-1:]), np.float32(-np.inf), logits)


def test_answers_are_those_of_the_formulas(generate, prompts, tiny_model, new_driver):
    params = [
        greedy(repetition_penalty=1.3),
        greedy(presence_penalty=1.9, frequency_penalty=0.7, logits_processors=[lift_the_median, forbid_the_last]),
        greedy(repetition_penalty=0.8, frequency_penalty=1.5, logit_bias={17: 3.0, 40: -2.0, EOS: 6}, min_tokens=12),
        greedy(allowed_token_ids=list(range(0, 300, 7)), presence_penalty=2, logprobs=3),
        greedy(repetition_penalty=1.1, bad_words=["100 200", "21"], logit_bias={200: 9, 100: 9, 21: 20}, logprobs=0),
    ]
    answers = generate(prompts, params)
    driver = new_driver(tiny_model)
    for prompt, p, answer in zip(prompts, params, answers, strict=True):
        bad_words = [[100, 200], [21]] if p.bad_words else []
        sequence, expected, plain = driver.new_sequence(), [], []
        [logits] = driver.step((sequence, prompt))
        while True:
            edited = np.array(expected_logits(logits, prompt, expected, p, (EOS,), bad_words))
            second, first = np.sort(edited)[-2:]
            assert first - second > MARGIN
            expected.append(int(edited.argmax()))
            plain.append(int(logits.argmax()))
            if expected[-1] == EOS or len(expected) == NUM_TOKENS:
                break
            [logits] = driver.step((sequence, expected[-1:]))
        driver.finish(sequence)
        assert answer == expected
        assert answer != plain  # what was asked for made a difference


@pytest.mark.oracle
def test_answers_are_those_of_transformers(generate, prompts):
    torch = pytest.importorskip("torch", reason="only the comparison with transformers needs torch")
    transformers = pytest.importorskip("transformers", reason="only the comparison with transformers needs it")
    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / "llama", dtype=torch.float32).eval()
    cases = [
        (greedy(repetition_penalty=1.3), {"repetition_penalty": 1.3}),
        (greedy(repetition_penalty=0.9, min_tokens=20), {"repetition_penalty": 0.9, "min_new_tokens": 20}),
        (
            greedy(logit_bias={17: 4.0, EOS: 7.0}, min_tokens=5, repetition_penalty=1.2),
            {"sequence_bias": {(17,): 4.0, (EOS,): 7.0}, "min_new_tokens": 5, "repetition_penalty": 1.2},
        ),
        (
            greedy(bad_words=["100 200", "21"], logit_bias={200: 9, 100: 9, 21: 20}, repetition_penalty=1.2),
            {
                "bad_words_ids": [[100, 200], [21]],
                "sequence_bias": {(200,): 9.0, (100,): 9.0, (21,): 20.0},
                "repetition_penalty": 1.2,
            },
        ),
        (greedy(allowed_token_ids=[*range(0, 300, 7)]), {"suppress_tokens": [i for i in range(300) if i % 7]}),
    ]
    answers = generate(prompts, [params for params, _ in cases])
    plain = generate(prompts, [greedy()] * len(cases))
    for prompt, (_, options), answer, unedited in zip(prompts, cases, answers, plain, strict=True):
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0,
            **options,
        )  # fmt: skip
        assert answer == output[0, len(prompt) :].tolist(), options
        assert answer != unedited
