"""Derives the golden files anew with transformers, and compares what they are too small to hold."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from cupaged.weights.checkpoint import Checkpoint
from cupaged.weights.packing import load_weights

pytestmark = pytest.mark.oracle
for package in ("torch", "transformers"):
    pytest.importorskip(package, reason="only the tests that derive the golden files anew need torch and transformers")

HERE = Path(__file__).parent
FLOAT_NOISE = 1e-4  # another version of torch, or another CPU, sums in another order


@pytest.fixture(scope="module")
def make_golden():
    spec = importlib.util.spec_from_file_location("make_golden", HERE / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same(derived: dict, name: str, noise: float) -> None:
    with np.load(HERE / "golden" / f"{name}.npz") as golden:
        assert set(golden) == set(derived)
        for key in golden:
            if golden[key].dtype.kind == "f":
                assert np.abs(derived[key] - golden[key]).max() <= noise, key
            else:
                assert np.array_equal(derived[key], golden[key]), key


def test_rope(make_golden):
    assert_same(make_golden.rope_tables(), "rope", 1e-7)


@pytest.mark.parametrize("name", ["llama", "llama_untied", "mistral", "qwen2", "qwen3"])
def test_tiny_models(make_golden, name):
    assert_same(make_golden.tiny_answers(name), name, FLOAT_NOISE)


def test_smollm2(make_golden, smollm2_dir):
    assert_same(make_golden.real_answers(smollm2_dir), "smollm2", 1e-3)


def test_every_logit_of_smollm2_on_a_long_prompt(make_golden, smollm2_dir, backend, new_driver):
    prompt = list(make_golden.real_prompts(smollm2_dir).values())[-1]
    assert len(prompt) == 1500
    transformer = make_golden.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype="float32").eval()
    expected = make_golden.logits_of(transformer, prompt)
    checkpoint = Checkpoint(smollm2_dir)
    model = checkpoint.config, load_weights(checkpoint.tensors, checkpoint.config, backend)
    driver = new_driver(model, num_blocks=128, max_num_tokens=1500, max_num_logits=1500)
    [logits] = driver.step((driver.new_sequence(), prompt), all_logits=True)
    error = np.abs(logits - expected).max(axis=1)
    print(f"largest error {error.max():.2e} at token {error.argmax()}, median over tokens {np.median(error):.2e}")
    assert error.max() <= 1e-3
