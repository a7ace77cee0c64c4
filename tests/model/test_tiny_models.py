"""Tiny models of each family, with random weights, against what transformers computed for them (make_golden.py)."""

import functools
from pathlib import Path

import numpy as np
import pytest

from cupaged.weights.checkpoint import Checkpoint
from cupaged.weights.packing import load_weights

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["llama", "llama_untied", "mistral", "qwen2", "qwen3"]
BLOCK_SIZE = 8

# float32 sums in another order: each of the 2 layers adds 4 products of up to 256 terms of a few units to a residual
# of up to a hundred, so some 1e-6 of that reaches the logits. Their own deviation is 2.5 and more.
LOGIT_BOUND = 1e-4


@functools.cache
def model(name, backend):
    checkpoint = Checkpoint(GOLDEN / name)
    return checkpoint.config, load_weights(checkpoint.tensors, checkpoint.config, backend)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        golden = dict(arrays)
    golden["prompts"] = [p.tolist() for p in np.split(golden["prompts"], np.cumsum(golden["lengths"])[:-1])]
    assert golden["logits"].std() > 2
    assert golden["margins"].min() > 50 * LOGIT_BOUND
    return golden


@pytest.fixture
def driver(name, backend, new_driver):
    return new_driver(model(name, backend), block_size=BLOCK_SIZE)


def assert_close(logits, expected):
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max() <= LOGIT_BOUND


def test_whole_prompts(golden, driver):
    for prompt, expected in zip(golden["prompts"], golden["last_logits"], strict=True):
        [logits] = driver.step((driver.new_sequence(), prompt))
        assert_close(logits, expected)


def test_every_row_of_a_prompt(golden, driver):
    [logits] = driver.step((driver.new_sequence(), golden["prompts"][-1]), all_logits=True)
    assert_close(logits, golden["logits"])


@pytest.mark.parametrize("chunk", [1, 3, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1])
def test_chunked_prompts(golden, driver, chunk):
    prompt, sequence = golden["prompts"][-1], driver.new_sequence()
    rows = [
        row
        for start in range(0, len(prompt), chunk)
        for row in driver.step((sequence, prompt[start : start + chunk]), all_logits=True)
    ]
    assert_close(np.concatenate(rows), golden["logits"])


def test_chunks_and_decodes_of_several_prompts_in_one_step(golden, driver):
    """The first tokens of each prompt, then in one step a decode, two chunks and a whole prompt."""
    prompts, sequences = golden["prompts"], [driver.new_sequence() for _ in golden["prompts"]]
    _, seven, sixteen, seventy, whole = range(5)
    driver.step((sequences[seven], prompts[seven][:-1]), (sequences[seventy], prompts[seventy][:51]))
    driver.step((sequences[seventy], prompts[seventy][51:52]), (sequences[sixteen], prompts[sixteen][:3]))
    order = [seven, 0, whole, sixteen, seventy]
    work = [(sequences[i], prompts[i][sequences[i].num_computed :]) for i in order]
    assert [len(tokens) for _, tokens in work] == [1, 1, 33, 13, 18]
    for i, logits in zip(order, driver.step(*work), strict=True):
        assert_close(logits, golden["last_logits"][i])


def test_a_step_without_logits(golden, driver):
    """A chunk in the middle of a prompt wants none."""
    prompt, sequence = golden["prompts"][-1], driver.new_sequence()
    assert driver.step((sequence, prompt[:9]), wanted=[]).shape == (0, 300)
    [logits] = driver.step((sequence, prompt[9:]))
    assert_close(logits, golden["last_logits"][-1])


def test_greedy_tokens_alone(golden, driver):
    for prompt, expected in zip(golden["prompts"], golden["greedy"].tolist(), strict=True):
        assert driver.greedy(prompt, len(expected)) == expected


def test_greedy_tokens_together(golden, driver):
    expected = golden["greedy"].tolist()
    assert driver.greedy_together(golden["prompts"], len(expected[0])) == expected


def test_too_many_tokens_or_logits_for_the_buffers(golden, name, backend, new_driver):
    driver = new_driver(model(name, backend), max_num_tokens=32, max_num_logits=2)
    with pytest.raises(ValueError, match="33 tokens are more than max_num_tokens=32"):
        driver.step((driver.new_sequence(), golden["prompts"][-1]))
    with pytest.raises(ValueError, match="7 logits are more than max_num_logits=2"):
        driver.step((driver.new_sequence(), golden["prompts"][1]), all_logits=True)
