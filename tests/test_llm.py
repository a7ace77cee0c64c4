"""LLM over a tiny random Llama, whose greedy tokens transformers has computed (tests/model/make_golden.py)."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cupaged import LLM, BeamSearchParams, SamplingParams
from cupaged.backends.cuda import Probe
from cupaged.backends.reference import ReferenceBackend
from cupaged.errors import (
    CheckpointError,
    CupagedError,
    DeviceError,
    ModelNotFoundError,
    OutOfMemoryError,
    QueueFullError,
)
from cupaged.sampling_params import RequestOutputKind

GOLDEN = Path(__file__).parent / "model" / "golden"
VOCAB_SIZE = 300
EOS = 2
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{{ suffix }}"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """The golden Llama with a tokenizer: 256 tokens that are bytes, and 44 words."""
    path = tmp_path_factory.mktemp("models") / "llama"
    shutil.copytree(GOLDEN / "llama", path)
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"word{i}" for i in range(256, VOCAB_SIZE))]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "llama.npz") as arrays:
        prompts = np.split(arrays["prompts"], np.cumsum(arrays["lengths"])[:-1])
        return [p.tolist() for p in prompts], arrays["greedy"].tolist()


@pytest.fixture(scope="module")
def shared_llm(model_dir):
    with LLM(model_dir, device="cpu", block_size=8) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm):
    """Idle before each test, and after."""
    yield shared_llm
    stats = shared_llm.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert not shared_llm._outputs


GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
SHORT = replace(GREEDY, max_tokens=6)


# -- generate -----------------------------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_transformers_alone_and_together(llm, golden):
    prompts, expected = golden
    together = llm.generate(prompts, GREEDY)
    assert [output.outputs[0].token_ids for output in together] == expected
    for prompt, tokens in zip(prompts, expected, strict=True):
        [output] = llm.generate(prompt, GREEDY)
        assert output.outputs[0].token_ids == tokens
        assert output.prompt_token_ids == prompt
        assert output.finished


@pytest.mark.parametrize("chunk", [3, 8, 64])
def test_chunks_and_preemption_change_no_token(model_dir, golden, chunk):
    prompts, expected = golden
    bytes_per_block = 2 * 2 * 64 * 4 * 8  # layers, K and V, head_dim, float32, tokens
    with LLM(
        model_dir, device="cpu", block_size=8, max_num_batched_tokens=chunk, max_num_seqs=4, max_model_len=120,
        kv_cache_memory_bytes=16 * bytes_per_block,
    ) as llm:  # fmt: skip
        outputs = llm.generate(prompts, GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        assert llm.engine.stats().num_preemptions > 0
        assert any("preemptions" in line for line in llm.stats_lines())


def test_text_in_text_out_in_the_order_of_the_prompts(llm):
    texts = ["b", "a longer prompt", "c"]
    outputs = llm.generate(texts, SHORT)
    tokenizer = llm.get_tokenizer()
    for text, output in zip(texts, outputs, strict=True):
        assert output.prompt == text
        assert output.prompt_token_ids == tokenizer.encode(text)
        assert output.outputs[0].text == tokenizer.decode(output.outputs[0].token_ids)
        assert output.outputs[0].finish_reason == "length"
        assert output.outputs[0].text == llm.generate(text, SHORT)[0].outputs[0].text


def test_each_prompt_may_have_its_own_params(llm):
    outputs = llm.generate(["a", "a"], [SHORT, replace(SHORT, max_tokens=3, logprobs=1)])
    assert [len(o.outputs[0].token_ids) for o in outputs] == [6, 3]
    assert outputs[0].outputs[0].logprobs is None
    assert len(outputs[1].outputs[0].logprobs) == 3
    with pytest.raises(ValueError, match="sampling_params: 1 of them for 2 prompts"):
        llm.generate(["a", "b"], [SHORT])
    assert llm.generate([], SHORT) == []


def test_a_seed_repeats_its_draws_whatever_runs_beside(llm):
    params = SamplingParams(temperature=1.5, seed=7, max_tokens=12, ignore_eos=True)
    [alone] = llm.generate("seeded", params)
    beside = llm.generate(["x", "seeded", "y" * 40], [GREEDY, params, SamplingParams(max_tokens=12, ignore_eos=True)])
    assert beside[1].outputs[0].token_ids == alone.outputs[0].token_ids
    [other] = llm.generate("seeded", replace(params, seed=8))
    assert other.outputs[0].token_ids != alone.outputs[0].token_ids


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([1, VOCAB_SIZE], r"token ids must be in \[0, 300\); got 300"),
        ([-1], "got -1"),
        ("x" * 600, "600 tokens.*max_model_len=512"),
    ],
)
def test_a_prompt_that_can_not_run_is_named_and_nothing_stays_behind(llm, prompt, message):
    with pytest.raises(ValueError, match=r"^prompts\[1\]: .*" + message):
        llm.generate(["fine", prompt], SHORT)
    if prompt:
        with pytest.raises(ValueError, match=message):
            llm.generate(prompt, SHORT)
        with pytest.raises(ValueError, match=message):
            llm.stream(prompt, SHORT)
    assert llm.generate("fine", SHORT)[0].finished


# -- beam search --------------------------------------------------------------------------------------------


def test_beam_search_has_the_shape_that_vllm_users_know(llm, golden):
    prompts, params = golden[0][:3], BeamSearchParams(beam_width=3, max_tokens=8, logprobs=2)
    results = llm.beam_search([{"prompt_token_ids": prompts[0]}, *prompts[1:]], params)
    outputs = llm.generate(prompts, params)
    for prompt, result, output in zip(prompts, results, outputs, strict=True):
        assert [s.tokens for s in result.sequences] == [prompt + c.token_ids for c in output.outputs]
        text = llm.get_tokenizer().decode(prompt)
        assert [s.text for s in result.sequences] == [text + c.text for c in output.outputs]
        scores = [s.cum_logprob / len(s.logprobs) for s in result.sequences]
        assert scores == sorted(scores, reverse=True)
        for sequence in result.sequences:
            new = sequence.tokens[len(prompt) :]
            chosen = [entries[token].logprob for token, entries in zip(new, sequence.logprobs, strict=True)]
            assert sequence.cum_logprob == pytest.approx(sum(chosen), abs=1e-5)
            assert sequence.finish_reason in ("stop", "length")


def test_beam_search_of_text(llm):
    [by_text], [by_mapping] = (
        llm.beam_search(prompt, BeamSearchParams(2, 5)) for prompt in ("Hello", {"prompt": "Hello"})
    )
    assert by_text == by_mapping
    assert all(sequence.text.startswith("Hello") for sequence in by_text.sequences)
    with pytest.raises(ValueError, match="'prompt' or 'prompt_token_ids'"):
        llm.beam_search([{"text": "Hello"}], BeamSearchParams(2, 5))
    with pytest.raises(ValueError, match="params must be BeamSearchParams"):
        llm.beam_search("Hello", SHORT)


def test_a_streamed_beam_search_ends_with_what_generate_gives(llm, golden):
    params = BeamSearchParams(3, 20, ignore_eos=True)
    *_, last = llm.stream(golden[0][2], params)
    [whole] = llm.generate(golden[0][2], params)
    assert [(c.token_ids, c.text) for c in last.outputs] == [(c.token_ids, c.text) for c in whole.outputs]


# -- chat and stream ----------------------------------------------------------------------------------------


def test_chat_is_generate_on_the_rendered_conversation(llm):
    hello, bye = [{"role": "user", "content": "hello"}], [{"role": "user", "content": "bye"}]
    [expected] = llm.generate("<user>hello", SHORT)
    [output] = llm.chat(hello, SHORT)
    assert output.prompt_token_ids == expected.prompt_token_ids
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    both = llm.chat([hello, bye], SHORT)
    assert both[0].outputs[0].token_ids == expected.outputs[0].token_ids
    assert both[1].prompt_token_ids == llm.get_tokenizer().encode("<user>bye")
    [output] = llm.chat(hello, SHORT, suffix="!")
    assert output.prompt_token_ids == llm.get_tokenizer().encode("<user>hello!")
    with pytest.raises(ValueError, match="messages"):
        llm.chat([], SHORT)


def test_stream_tells_after_each_token(llm):
    [expected] = llm.generate("stream", SHORT)
    outputs = list(llm.stream("stream", SHORT))
    assert [o.outputs[0].token_ids for o in outputs] == [expected.outputs[0].token_ids[: n + 1] for n in range(6)]
    assert outputs[-1].outputs[0].text == expected.outputs[0].text
    assert [o.finished for o in outputs] == [False] * 5 + [True]
    assert outputs[0].prompt == "stream"

    deltas = list(llm.stream("stream", replace(SHORT, output_kind=RequestOutputKind.DELTA)))
    assert [t for o in deltas for t in o.outputs[0].token_ids] == expected.outputs[0].token_ids
    assert "".join(o.outputs[0].text for o in deltas) == expected.outputs[0].text


def test_breaking_off_a_stream_ends_its_request(llm):
    for output in llm.stream("stream", GREEDY):
        if len(output.outputs[0].token_ids) == 2:
            break
    else:
        raise AssertionError("it ended by itself")
    llm.stream("never started", GREEDY)


def test_streams_and_generate_side_by_side(llm):
    expected = [output.outputs[0].token_ids for output in llm.generate(["one", "two", "three"], SHORT)]
    one, two = llm.stream("one", SHORT), llm.stream("two", SHORT)
    next(one)
    next(two)
    assert llm.generate("three", SHORT)[0].outputs[0].token_ids == expected[2]
    assert list(two)[-1].outputs[0].token_ids == expected[1]
    assert list(one)[-1].outputs[0].token_ids == expected[0]


# -- failures -----------------------------------------------------------------------------------------------


def fail_at_step(llm, monkeypatch, number, error):
    decoder, count = llm.engine.runner.decoder, iter(range(10**6))
    forward = decoder.forward

    def failing(batch, arena):
        if next(count) == number:
            raise error
        return forward(batch, arena)

    monkeypatch.setattr(decoder, "forward", failing)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a kernel failed")])
@pytest.mark.parametrize("step", [0, 3])
def test_an_interrupted_generate_leaves_the_llm_usable(llm, monkeypatch, step, error):
    [expected] = llm.generate("after", SHORT)
    fail_at_step(llm, monkeypatch, step, error)
    with pytest.raises(type(error)):
        llm.generate(["a", "b", "c"], GREEDY)
    assert not llm.engine.has_unfinished_requests()
    assert llm.generate("after", SHORT)[0].outputs[0].token_ids == expected.outputs[0].token_ids


def test_a_stream_that_loses_its_request_to_anothers_failure_says_so(llm, monkeypatch):
    stream = llm.stream("stream", GREEDY)
    next(stream)
    fail_at_step(llm, monkeypatch, 2, RuntimeError("a kernel failed"))
    with pytest.raises(RuntimeError):
        llm.generate("other", GREEDY)
    with pytest.raises(CupagedError, match="ended by an error in a step"):
        list(stream)


def test_closing(model_dir):
    with LLM(model_dir, device="cpu") as llm:
        stream = llm.stream("stream", GREEDY)
        next(stream)
    llm.close()
    stream.close()
    with pytest.raises(RuntimeError, match="this LLM is closed"):
        llm.generate("a")


# -- construction -------------------------------------------------------------------------------------------


def test_device_and_dtype(model_dir, monkeypatch):
    monkeypatch.setattr("cupaged.backends.cuda.probe", lambda: Probe(False, "no NVIDIA driver is installed"))
    with LLM(model_dir) as llm:
        assert llm.device_note.startswith("running on ")
        assert llm.device_note.endswith(", as there is no usable GPU: no NVIDIA driver is installed")
    with LLM(model_dir, device="cpu", dtype="float32") as llm:
        assert "GPU" not in llm.device_note
    with pytest.raises(DeviceError, match="device 'cuda' can't be used: no NVIDIA driver is installed"):
        LLM(model_dir, device="cuda")
    for dtype in ("bfloat16", "float16"):
        with pytest.raises(ValueError, match=f"dtype must be float32, or auto, on the CPU; got '{dtype}'"):
            LLM(model_dir, device="cpu", dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "checkpoint_dtype", "use_cuda", "chosen"),
    [
        ("auto", "bfloat16", True, "bfloat16"),
        ("auto", "float16", True, "float16"),
        ("auto", "float32", True, "bfloat16"),
        ("float16", "bfloat16", True, "float16"),
        ("auto", "bfloat16", False, "float32"),
        ("float32", "bfloat16", False, "float32"),
        ("float32", "float32", True, None),
    ],
)
def test_the_dtype_follows_the_checkpoint_where_the_device_can(dtype, checkpoint_dtype, use_cuda, chosen):
    from cupaged.backends.select import choose_dtype

    if chosen is not None:
        assert choose_dtype(dtype, checkpoint_dtype, use_cuda) == chosen
    else:
        with pytest.raises(ValueError, match="dtype must be bfloat16 or float16, or auto, on a GPU; got 'float32'"):
            choose_dtype(dtype, checkpoint_dtype, use_cuda)


def test_options_that_can_not_be_met(model_dir, tmp_path):
    with pytest.raises(ModelNotFoundError):
        LLM(tmp_path / "nowhere.gguf", device="cpu")
    with pytest.raises(ValueError, match="block_size"):
        LLM(model_dir, device="cpu", block_size=10)
    with pytest.raises(ValueError, match="max_model_len must be at most the model's 512 positions; got 513"):
        LLM(model_dir, device="cpu", max_model_len=513)
    with pytest.raises(OutOfMemoryError, match=r"max_model_len=512 needs 512.0 KiB.*128.0 KiB"):
        LLM(model_dir, device="cpu", max_model_len=512, kv_cache_memory_bytes=128 << 10)


def test_kernels_are_compiled_while_the_weights_are_copied(model_dir, monkeypatch):
    started, copied = threading.Event(), threading.Event()

    def compile(backend, config):
        started.set()
        assert config.head_dim == 64
        assert copied.wait(60)

    def copy_in(backend, dst, src):
        assert started.wait(60)
        copied.set()
        dst[...] = src

    monkeypatch.setattr(ReferenceBackend, "compile", compile)
    monkeypatch.setattr(ReferenceBackend, "copy_in", copy_in)
    LLM(model_dir, device="cpu").close()


def test_kernels_that_do_not_compile_are_reported(model_dir, monkeypatch):
    def fail(backend, config):
        raise CupagedError("x.cu: error")

    monkeypatch.setattr(ReferenceBackend, "compile", fail)
    with pytest.raises(CupagedError, match=r"^x\.cu: error$"):
        LLM(model_dir, device="cpu")


def test_bad_weights_are_reported_before_all_kernels_are_compiled(model_dir, tmp_path, monkeypatch):
    path = tmp_path / "model"
    shutil.copytree(model_dir, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB_SIZE + 1}))
    reported = threading.Event()
    monkeypatch.setattr(ReferenceBackend, "compile", lambda *_: reported.wait(60))
    try:
        with pytest.raises(CheckpointError, match="wrong shapes: model"):
            LLM(path, device="cpu")
        assert not reported.is_set()
    finally:
        reported.set()


def test_the_generation_config_gives_the_defaults_and_more_eos_ids(model_dir, tmp_path, golden):
    path = tmp_path / "model"
    shutil.copytree(model_dir, path)
    prompts, expected = golden
    eos = expected[1][3]
    assert eos not in expected[1][:3]
    (path / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "top_p": 0.9, "top_k": 5, "eos_token_id": [EOS, eos], "max_new_tokens": 9})
    )
    with LLM(path, device="cpu") as llm:
        defaults = llm.get_default_sampling_params()
        assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.max_tokens) == (0, 0.9, 5, 9)
        completion = llm.generate(prompts[1])[0].outputs[0]
        assert completion.token_ids == expected[1][:4]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", None)


def test_the_defaults_without_a_generation_config_are_sampling_params_own(llm):
    assert llm.get_default_sampling_params() == SamplingParams()


def test_stats_lines(llm):
    llm.generate("a", SHORT)
    text = "\n".join(llm.stats_lines())
    assert "KV cache: " in text
    assert "KV waste: " in text


# -- sharing ------------------------------------------------------------------------------------------------


def test_n_outputs_are_those_of_n_seeded_requests(llm):
    params = SamplingParams(n=3, temperature=1.2, seed=5, max_tokens=8, ignore_eos=True)
    [together] = llm.generate("several", params)
    assert [completion.index for completion in together.outputs] == [0, 1, 2]
    for i, completion in enumerate(together.outputs):
        [alone] = llm.generate("several", replace(params, n=1, seed=5 + i))
        assert completion.token_ids == alone.outputs[0].token_ids
        assert completion.text == alone.outputs[0].text
    streamed = [""] * 3
    for output in llm.stream("several", replace(params, output_kind=RequestOutputKind.DELTA)):
        for completion in output.outputs:
            streamed[completion.index] += completion.text
    assert streamed == [completion.text for completion in together.outputs]


def test_prompts_that_begin_alike_are_computed_once(llm):
    text = "a system prompt that all of them have in common: "
    llm.reset_prefix_cache()
    first, *others = llm.generate([text + end for end in "abc"], SHORT)
    assert first.num_cached_tokens == 0
    assert {output.num_cached_tokens for output in others} == {len(text) // 8 * 8}
    assert "prefix cache: " in "\n".join(llm.stats_lines())
    [salted] = llm.generate(text + "a", SHORT, cache_salt="salt")
    assert salted.num_cached_tokens == 0
    assert salted.outputs[0].token_ids == first.outputs[0].token_ids
    llm.reset_prefix_cache()
    assert llm.generate(text + "a", SHORT)[0].num_cached_tokens == 0


def test_options_of_sharing_and_of_service(model_dir):
    with LLM(
        model_dir, device="cpu", block_size=8, enable_prefix_caching=False, scheduling_policy="priority",
        max_num_seqs=1, max_queue_len=3, debug=True, enforce_eager=True,
    ) as llm:  # fmt: skip
        assert llm.engine.config.enforce_eager
        text = "a prompt of many tokens"
        assert [llm.generate(text, SHORT)[0].num_cached_tokens for _ in range(2)] == [0, 0]
        outputs = llm.generate(["a", "b", "c"], SHORT, priority=[3, 1, 2])
        ends = [output.metrics.finished_time for output in outputs]
        assert sorted(range(3), key=ends.__getitem__) == [1, 2, 0]
        with pytest.raises(QueueFullError, match="3 requests wait already"):
            llm.generate(["a"] * 4, SHORT)
        with pytest.raises(ValueError, match="priority: 1 of them for 2 prompts"):
            llm.generate(["a", "b"], SHORT, priority=[1])
        assert not llm.engine.has_unfinished_requests()
    with pytest.raises(ValueError, match="scheduling_policy must be one of fcfs, priority; got 'lifo'"):
        LLM(model_dir, device="cpu", scheduling_policy="lifo")
    with pytest.raises(ValueError, match="max_queue_len must be an integer >= 1, or None; got 0"):
        LLM(model_dir, device="cpu", max_queue_len=0)
