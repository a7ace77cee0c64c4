"""Whole models on a GPU: their error against float32, batches, long prompts, memory, graphs.

The first run compiles some 50 kernels. -rP shows the figures that the tests print.
"""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
from model.conftest import Driver
from model_tools import MODELS, RoundingBackend, golden, mixed_steps, new_driver, new_engine, rms
from sampling_tools import make_rows

from cupaged import LLM, SamplingParams
from cupaged.backends.base import SAMPLING_ROW
from cupaged.backends.cuda import open_cuda, probe
from cupaged.backends.reference import ReferenceBackend
from cupaged.engine.engine import Engine
from cupaged.engine.step_graphs import BATCH_SIZES
from cupaged.kernels.checks import BFLOAT16, HALF_TYPES
from cupaged.kernels.device import device_info
from cupaged.weights.checkpoint import Checkpoint
from cupaged.weights.packing import load_weights

FOUND = probe()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not FOUND.usable, reason=f"needs a GPU: {FOUND.text}")]

CLEAR_MARGIN = 0.05  # between float32's two largest logits; below, a 16-bit type may well choose the other
GREEDY = {"temperature": 0, "ignore_eos": True}


# -- tiny models against transformers' float32 -----------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_tiny_models_err_no_more_than_a_plain_implementation(name, dtype):
    expected = np.tile(golden(name)["logits"], (2, 1))
    error = mixed_steps(new_driver(name, open_cuda(dtype)), name) - expected
    plain_error = mixed_steps(new_driver(name, RoundingBackend(dtype)), name) - expected
    print(f"error {rms(error):.3g}, of a plain implementation {rms(plain_error):.3g} (root of the mean square)")
    assert rms(error) <= 1.25 * rms(plain_error)
    assert np.abs(error).max() <= 2 * np.abs(plain_error).max()


def test_steps_can_be_captured_into_a_graph():
    """A decode step and its draws: captured once, the graph runs the steps after it, whose batches lie where the first
    one's lay. Global capture refuses allocations, synchronisation and copies to the host."""
    import cupy

    def run(wrap) -> tuple[list, list]:
        backend = open_cuda(BFLOAT16)
        driver = new_driver("qwen3", backend)
        prompts = golden("qwen3")["prompts"]
        sequences = [driver.new_sequence() for _ in range(2)]
        driver.step(*((seq, prompt[:3]) for seq, prompt in zip(sequences, (prompts[1], prompts[2]), strict=True)))
        rows, token_ids = backend.empty((2,), SAMPLING_ROW), backend.empty((2,), np.int32)
        backend.copy_in(rows, make_rows(2, seed=[1, 2]))
        forward = driver.decoder.forward

        def forward_and_sample(batch, arena):
            logits = forward(batch, arena)
            backend.sample(token_ids, logits, rows, 300)
            return logits

        results, drawn = [], []
        forward_and_sample = wrap(forward_and_sample)
        driver.decoder.forward = forward_and_sample
        for token in (5, 6, 7):  # positions 3 to 5, of blocks of 8
            results += driver.step(*((seq, [token]) for seq in sequences))
            drawn += backend.to_host(token_ids).tolist()
        return results, drawn

    def capture(function):
        graphs, kept = [], []

        def replay(*arguments):
            if not graphs:
                stream.begin_capture(cupy.cuda.runtime.streamCaptureModeGlobal)
                kept.append(function(*arguments))
                graphs.append(stream.end_capture())
            graphs[0].launch(stream)
            return kept[0]

        return replay

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        expected, expected_drawn = run(lambda function: function)
        gc.collect()  # now, not during the capture, which memory given back would break
        actual, drawn = run(capture)
    assert np.array_equal(actual, expected)
    assert drawn == expected_drawn
    assert not np.array_equal(expected[0], expected[2])


# -- SmolLM2 against float32 -----------------------------------------------------------------------------------


@dataclass
class Errors:
    """Logits against float32's, over all positions that were added."""

    largest: list[float] = field(default_factory=list)  # of each position
    sum_of_squares: float = 0.0
    num_logits: int = 0
    num_clear: int = 0  # positions where float32's choice is clear
    num_agreed: int = 0  # and of these, where the choice is the same

    def add(self, logits: np.ndarray, expected: np.ndarray) -> None:
        """logits, expected [positions, vocab_size]"""
        assert np.isfinite(logits).all()
        error = np.abs(logits - expected)
        self.largest += error.max(axis=1).tolist()
        self.sum_of_squares += float(np.square(error, dtype=np.float64).sum())
        self.num_logits += error.size
        clear = is_clear(expected)
        self.num_clear += int(clear.sum())
        self.num_agreed += int((clear & (logits.argmax(axis=1) == expected.argmax(axis=1))).sum())

    @property
    def rms(self) -> float:
        return (self.sum_of_squares / self.num_logits) ** 0.5

    @property
    def agreement(self) -> float:
        return self.num_agreed / self.num_clear

    def __str__(self) -> str:
        return (
            f"error {self.rms:.4f} (root of the mean square), a position's largest {np.mean(self.largest):.3f} on "
            f"average, {max(self.largest):.3f} of all; {self.agreement:.2%} agree where float32 is clear"
        )


def is_clear(logits: np.ndarray) -> np.ndarray:
    second, first = np.moveaxis(np.partition(logits, -2, axis=-1)[..., -2:], -1, 0)
    return first - second > CLEAR_MARGIN


@pytest.fixture(scope="module")
def texts() -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) token ids: what people write, in 1 to 1,500 tokens, and float32's 64 tokens after it."""
    smollm2 = golden("smollm2")
    return list(zip(smollm2["prompts"], smollm2["greedy"].tolist(), strict=True))


@pytest.fixture(scope="module")
def checkpoint(smollm2_dir) -> Checkpoint:
    return Checkpoint(smollm2_dir)


def real_driver(checkpoint: Checkpoint, backend, **sizes) -> Driver:
    weights = load_weights(checkpoint.tensors, checkpoint.config, backend)
    return Driver(checkpoint.config, weights, backend, **sizes)


@pytest.fixture(scope="module")
def float32_driver(checkpoint) -> Driver:
    """NumPy's, which tests/model holds against transformers."""
    return real_driver(checkpoint, ReferenceBackend(), num_blocks=512, max_num_tokens=2048, max_num_logits=2048)


def transformers_model(model_dir):
    """transformers' bfloat16 model on the GPU; None where it is not installed or has no GPU."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval().cuda()

    @torch.no_grad()
    def logits_of(token_ids: list[int]) -> np.ndarray:
        return model(torch.tensor([token_ids]).cuda(), use_cache=False).logits[0].float().cpu().numpy()

    return logits_of


@pytest.fixture(scope="module")
def errors(checkpoint, smollm2_dir, texts, float32_driver) -> dict[str, Errors]:
    """Of "bfloat16", "float16" and, where it can run, "transformers", over all texts. The kernels take a prompt in
    one step and the answer token by token."""
    sizes = {"num_blocks": 256, "max_num_tokens": 2048, "max_num_logits": 2048}
    drivers = {str(dtype): real_driver(checkpoint, open_cuda(dtype), **sizes) for dtype in HALF_TYPES}
    transformer = transformers_model(smollm2_dir)
    errors = {name: Errors() for name in drivers} | ({"transformers": Errors()} if transformer else {})
    for prompt, answer in texts:
        [expected] = float32_driver.step((seq := float32_driver.new_sequence(), prompt + answer), all_logits=True)
        float32_driver.finish(seq)
        for name, driver in drivers.items():
            seq = driver.new_sequence()
            parts = [prompt, *([token] for token in answer)]
            errors[name].add(np.concatenate([driver.step((seq, part), all_logits=True)[0] for part in parts]), expected)
            driver.finish(seq)
        if transformer:
            errors["transformers"].add(transformer(prompt + answer), expected)
    return errors


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_float32_is_agreed_with_where_it_is_clear(errors, dtype):
    print(errors[str(dtype)])
    assert errors[str(dtype)].num_clear > 2000
    assert errors[str(dtype)].agreement >= 0.99


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_the_error_is_below_that_of_transformers_in_bfloat16(errors, dtype):
    """Whose residual is rounded 60 times. With this rounding left out NumPy finds 0.56 of its error, and 0.66 of its
    largest. The largest error of all positions is printed only: one position's luck decides it."""
    if "transformers" not in errors:
        pytest.skip("needs torch, with CUDA, and transformers: pip install torch transformers")
    own, theirs = errors[str(dtype)], errors["transformers"]
    print(f"cupaged:      {own}\ntransformers: {theirs}")
    assert own.rms <= 0.9 * theirs.rms
    assert np.mean(own.largest) <= 0.9 * np.mean(theirs.largest)


# -- the engine ------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    token_ids: list[int]
    logprobs: list[float]  # of each


def generate(llm: LLM, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
    """Greedy answers of exactly max_tokens tokens."""
    results = llm.generate(prompts, SamplingParams(max_tokens=max_tokens, logprobs=0, **GREEDY))
    outputs = [result.outputs[0] for result in results]
    assert all(output.finish_reason == "length" and len(output.token_ids) == max_tokens for output in outputs)
    return [
        Answer(output.token_ids, [entry[t].logprob for entry, t in zip(output.logprobs, output.token_ids, strict=True)])
        for output in outputs
    ]


def float32_logits(driver: Driver, prompt: list[int], answer: list[int], chunk: int = 500) -> np.ndarray:
    """[len(answer), vocab_size]: the logits that each token of the answer is drawn from."""
    seq, tokens = driver.new_sequence(), prompt + answer[:-1]
    begin = len(tokens) - len(answer)
    starts = [*range(0, begin, chunk), begin]
    for start, stop in itertools.pairwise(starts):
        driver.step((seq, tokens[start:stop]))
    [logits] = driver.step((seq, tokens[begin:]), all_logits=True)
    driver.finish(seq)
    return logits


def test_64_prompts_at_once(smollm2_dir, texts, float32_driver):
    prompts = [(texts[i % len(texts)][0] + texts[i % len(texts)][1])[: 3 + 2 * i] for i in range(64)]
    with LLM(smollm2_dir, device="cuda", max_model_len=2048) as llm:
        answers = generate(llm, prompts, 32)
        stats = llm.engine.stats()
    assert stats.num_preemptions == 0
    assert stats.num_steps < 64  # together
    num_clear = num_agreed = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = float32_logits(float32_driver, prompt, answer.token_ids)
        clear = is_clear(logits)
        num_clear += clear.sum()
        num_agreed += (clear & (logits.argmax(axis=1) == answer.token_ids)).sum()
    print(f"{num_agreed} of {num_clear} clear choices are float32's")
    assert num_agreed >= 0.98 * num_clear  # a wrong block leaves next to nothing


def test_a_prompt_of_7000_tokens(smollm2_dir, texts, float32_driver):
    """In one step and in chunks: the same bits, near float32's."""
    prompt = [token for prompt, answer in texts * 3 for token in prompt + answer][:7000]
    assert len(prompt) == 7000
    answers = []
    for max_num_batched_tokens in (8192, 1024):
        sizes = {"max_model_len": 8192, "max_num_batched_tokens": max_num_batched_tokens}
        with LLM(smollm2_dir, device="cuda", **sizes) as llm:
            answers += generate(llm, [prompt], 8)
    assert answers[0] == answers[1]
    logits = float32_logits(float32_driver, prompt, answers[0].token_ids).astype(np.float64)
    gaps = logits.max(axis=1) - logits[np.arange(8), answers[0].token_ids]
    logprobs = -gaps - np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1))
    error = np.abs(logprobs - answers[0].logprobs)
    print(f"log probabilities are off by {error.max():.3f} at most, {error.mean():.3f} on average")
    assert gaps.max() < 1  # the chosen ones are float32's, or close
    assert error.mean() < 0.25


# -- graphs ----------------------------------------------------------------------------------------------------


def edge_sizes(max_num_seqs: int) -> list[int]:
    """From max_num_seqs down to 1: of each captured size the most and the fewest sequences that it takes."""
    sizes = [0, *(size for size in BATCH_SIZES if size < max_num_seqs), max_num_seqs]
    return [edge for below, size in reversed(list(itertools.pairwise(sizes))) for edge in (size, below + 1)]


def run_staggered(engine: Engine, sizes: list[int]) -> dict[str, Answer]:
    """sizes[0] short prompts that enter together and leave so that sizes[k] sequences take part in step k + 1."""
    for i in range(sizes[0]):
        params = {"max_tokens": 1 + sum(i < size for size in sizes), "temperature": i % 2, "seed": i}
        prompt = [3 + i] * (1 + i % 2)
        engine.add_request(str(i), prompt, SamplingParams(**params, ignore_eos=True, logprobs=0))
    return run_to_the_end(engine)


def run_to_the_end(engine: Engine) -> dict[str, Answer]:
    answers = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            [completion] = output.outputs
            logprobs = [entry[t].logprob for entry, t in zip(completion.logprobs, completion.token_ids, strict=True)]
            answers[output.request_id] = Answer(completion.token_ids, logprobs)
    return answers


@pytest.mark.parametrize("max_num_seqs", [26, 256])
def test_graphs_give_the_bits_of_eager_steps_on_a_tiny_model(max_num_seqs):
    """With one step in flight and with two."""
    sizes = edge_sizes(max_num_seqs)
    answers = []
    for enforce_eager, async_scheduling in itertools.product((True, False), (False, True)):
        engine = new_engine(
            "qwen3", open_cuda(BFLOAT16), max_num_seqs=max_num_seqs, num_blocks=4096, enforce_eager=enforce_eager,
            async_scheduling=async_scheduling,
        )  # fmt: skip
        answers.append(run_staggered(engine, sizes))
        assert engine.stats().num_graphs == (0 if enforce_eager else len(sizes) / 2)
        engine.close()
    assert all(answer == answers[0] for answer in answers[1:])


@pytest.mark.parametrize("own_stream", [False, True])
def test_graphs_on_the_default_stream_and_on_another(own_stream):
    """Of which the first can't be captured."""
    import contextlib

    import cupy

    answers = []
    for enforce_eager in (True, False):
        with cupy.cuda.Stream(non_blocking=True) if own_stream else contextlib.nullcontext():
            engine = new_engine("qwen3", open_cuda(BFLOAT16), enforce_eager=enforce_eager)
            answers.append(run_staggered(engine, edge_sizes(8)))
            assert engine.stats().num_graphs == (0 if enforce_eager else 4)
            engine.close()
    assert answers[0] == answers[1]


def test_graphs_give_the_bits_of_eager_steps_on_a_real_model(smollm2_dir):
    import cupy

    sizes, answers = edge_sizes(256), []
    for enforce_eager in (True, False):
        with LLM(smollm2_dir, device="cuda", max_model_len=2048, enforce_eager=enforce_eager) as llm:
            pool, runtime = cupy.get_default_memory_pool(), cupy.cuda.runtime
            before = runtime.memGetInfo()[0] + pool.total_bytes()
            answers.append(run_staggered(llm.engine, sizes))
            taken, num_graphs = before - runtime.memGetInfo()[0] - pool.total_bytes(), llm.engine.stats().num_graphs
            assert num_graphs == (0 if enforce_eager else len(sizes) / 2)
            print(f"{num_graphs} graphs; the driver took {taken / 2**20:.0f} MiB")
    assert answers[0] == answers[1]
    assert taken < 0.5 * 2**30


def test_graphs_of_growing_sequences(smollm2_dir):
    """Over the edges of the lengths that steps are captured for, in a cache that grows and shrinks."""
    answers = []
    for enforce_eager in (True, False):
        with LLM(smollm2_dir, device="cuda", max_model_len=2048, enforce_eager=enforce_eager) as llm:
            engine = llm.engine
            for turn in range(2):
                for i, length in enumerate((3, 240, 500, 1010, 2000)):
                    params = SamplingParams(max_tokens=40, logprobs=0, **GREEDY)
                    engine.add_request(f"{turn} {i}", [(7 * i + j + turn) % 1000 + 10 for j in range(length)], params)
                    engine.step()
                answers.append(run_to_the_end(engine))
                engine.trim()
            assert (engine.stats().num_graphs == 0) == enforce_eager
    assert answers[:2] == answers[2:]


# -- what people see -------------------------------------------------------------------------------------------


def test_prompt_logprobs_and_a_logits_processor(smollm2_dir, texts, float32_driver):
    """Of a prompt in chunks, its logits in several groups, against float32's; beside a request whose logits change."""
    import cupy

    prompt, answer = max(texts, key=lambda text: len(text[0]))

    def forbid_the_first(output_token_ids, logits):
        assert isinstance(logits, cupy.ndarray)
        logits[answer[0]] = -cupy.inf
        return cupy.where(logits > logits.max() - 5, logits, cupy.float32(-cupy.inf))

    score = SamplingParams(max_tokens=1, prompt_logprobs=0, **GREEDY)
    edit = SamplingParams(max_tokens=8, logits_processors=[forbid_the_first], logprobs=0, **GREEDY)
    with LLM(smollm2_dir, device="cuda", max_model_len=2048, max_num_batched_tokens=512, max_num_seqs=100) as llm:
        scored, edited = llm.generate([prompt, prompt], [score, edit])
    assert edited.outputs[0].finish_reason == "length"
    assert answer[0] not in edited.outputs[0].token_ids

    [logits] = float32_driver.step((seq := float32_driver.new_sequence(), prompt), all_logits=True)
    float32_driver.finish(seq)
    logits = logits[:-1].astype(np.float64) - logits[:-1].max(axis=1, keepdims=True)
    expected = logits[np.arange(len(logits)), prompt[1:]] - np.log(np.exp(logits).sum(axis=1))
    assert scored.prompt_logprobs[0] is None
    values = [entry[i].logprob for i, entry in zip(prompt[1:], scored.prompt_logprobs[1:], strict=True)]
    error = np.abs(values - expected)
    print(f"log probabilities are off by {error.max():.3f} at most, {error.mean():.3f} on average")
    assert error.mean() < 0.25


def test_one_prompt_takes_little_memory(smollm2_dir):
    """Of what CuPy's pool takes from the card; preallocation and long contexts are for those who ask."""
    import cupy

    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc), LLM(smollm2_dir, device="cuda") as llm:
        generate(llm, [[1, 2, 3]], 16)
        print(f"{pool.total_bytes() / 2**20:.0f} MiB")
        assert pool.total_bytes() < 0.9 * 2**30


def test_the_command_line_prints_sensible_text(smollm2_dir):
    command = [sys.executable, "-m", "cupaged.cli.main", "generate", "The capital of France is", "-n", "16"]
    options = ["--temperature", "0", "--device", "cuda", "-m", str(smollm2_dir)]
    result = subprocess.run([*command, *options], capture_output=True, text=True, env=dict(os.environ), check=False)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert FOUND.text.split(" (")[0] in result.stderr  # the device's name


WITHOUT_NVRTC = """
import cuda.pathfinder
load = cuda.pathfinder.load_nvidia_dynamic_lib
def load_others(name):
    if name == "nvrtc":
        raise cuda.pathfinder.DynamicLibNotFoundError(name)
    return load(name)
cuda.pathfinder.load_nvidia_dynamic_lib = load_others
cuda.pathfinder.find_nvidia_header_directory = lambda name: None
from cupaged.cli.main import main
main()
"""


def test_kernels_that_were_compiled_ahead_are_all_that_a_start_needs(smollm2_dir, tmp_path):
    environment = os.environ | {"CUPAGED_KERNELS": str(tmp_path / "kernels"), "CUPAGED_HOME": str(tmp_path / "home")}

    def run(program: list[str], *arguments: str) -> str:
        command = [sys.executable, *program, *arguments, "-m", str(smollm2_dir)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    run(["-m", "cupaged.cli.main"], "compile", "--arch", device_info().arch)
    options = ["--max-tokens", "16", "--temperature", "0", "--device", "cuda"]
    assert "Paris" in run(["-c", WITHOUT_NVRTC], "generate", "The capital of France is", *options)
    assert not (tmp_path / "home" / "kernels").exists()
