"""The CUDA backend without a GPU: all of it but CuPy, its kernels run by the host build, on whole tiny models.

The models are those of tests/model, whose logits transformers computed in float32.
"""

import os
import sys
import threading
import types
from dataclasses import replace

import numpy as np
import pytest
from host_device import H100, CupyArraysDevice, NumpyDevice
from model.conftest import Driver
from model_tools import GOLDEN, MODELS, RoundingBackend, golden, mixed_steps, new_driver, new_engine, rms
from sampling_tools import make_rows, random_logits

from cupaged.backends import cuda, host_copy, sampling_reference
from cupaged.backends.base import SAMPLING_ROW
from cupaged.backends.cuda import CudaBackend, needed_kernels, open_cuda, probe
from cupaged.backends.host_copy import HostCopier
from cupaged.backends.reference import ReferenceBackend
from cupaged.config import ModelConfig
from cupaged.engine import sampler as sampler_module
from cupaged.engine.batch import Batch
from cupaged.engine.logit_edits import LogitRules
from cupaged.engine.sampler import Sampler
from cupaged.engine.sequence import Request
from cupaged.errors import DeviceError, OutOfMemoryError
from cupaged.kernels.checks import BFLOAT16, FLOAT16, FLOAT32, HALF_TYPES
from cupaged.kernels.device import DeviceInfo, set_device_info
from cupaged.kernels.tier import use_sm90
from cupaged.memory.arena import KVArena, KVLayout
from cupaged.sampling_params import SamplingParams
from cupaged.weights.checkpoint import Checkpoint
from cupaged.weights.packing import load_weights, parameter_shapes


@pytest.fixture
def backend(host_build):
    return CudaBackend(host_build[0], BFLOAT16)


# -- whole models --------------------------------------------------------------------------------------------


# (device, model, dtype, tier)
WHOLE_MODELS = [
    *((NumpyDevice, name, dtype, "portable") for name in MODELS for dtype in HALF_TYPES),
    (CupyArraysDevice, "qwen2", FLOAT16, "portable"),
    (CupyArraysDevice, "qwen3", BFLOAT16, "portable"),
    (NumpyDevice, "llama", BFLOAT16, "sm90"),
    (NumpyDevice, "mistral", FLOAT16, "sm90"),
]


@pytest.mark.parametrize(("host_build", "name", "dtype", "tier"), WHOLE_MODELS, indirect=["host_build"])
def test_whole_models_err_no_more_than_a_plain_implementation(host_build, name, dtype, tier, monkeypatch):
    monkeypatch.setenv("CUPAGED_TIER", tier)
    # So that the longest prompt here is many rows.
    monkeypatch.setattr(cuda, "linear_few_is_quickest", lambda num_rows, *_: 16 < num_rows <= 32)
    device, loaded = host_build
    expected = np.tile(golden(name)["logits"], (2, 1))
    actual = mixed_steps(new_driver(name, CudaBackend(device, dtype)), name)
    plain = mixed_steps(new_driver(name, RoundingBackend(dtype)), name)
    assert actual.dtype == FLOAT32
    assert actual.shape == expected.shape == (66, 300)
    assert np.isfinite(actual).all()

    error, plain_error = actual - expected, plain - expected
    assert rms(error) <= 1.25 * rms(plain_error)
    assert np.abs(error).max() <= 2 * np.abs(plain_error).max()
    assert 10 * rms(plain_error) < rms(expected - expected.mean())  # or else anything would pass

    assert loaded <= set(needed_kernels(dtype, 64, sm90=tier == "sm90"))
    used = {file for file, _ in loaded}
    large = {
        "portable": {"linear.cu", "paged_decode.cu", "paged_prefill.cu"},
        "sm90": {"linear_few_sm90.cu", "linear_sm90.cu", "paged_decode_sm90.cu", "paged_prefill_sm90.cu"},
    }[tier]
    assert used == {"embedding.cu", "linear_small.cu", "rms_norm.cu", "rope.cu"} | large


@pytest.mark.parametrize("shape", [(4096, 4096), (576, 576)])
def test_orders_of_summation_change_between_classes_of_rows_only(backend, shape, monkeypatch):
    weight = np.broadcast_to(BFLOAT16.type(0), shape)

    def classes() -> list[int]:
        kernels = [
            backend._linear_kernels(np.broadcast_to(BFLOAT16.type(0), (m, shape[1])), weight) for m in range(1, 70)
        ]
        names = [getattr(linear, "func", linear).__name__ for linear, _ in kernels]
        return [m + 1 for m in range(1, 69) if names[m] != names[m - 1]]

    assert classes() == [17]
    monkeypatch.setattr(backend, "_sm90", True)
    assert classes() == ([65] if shape == (4096, 4096) else [17, 65])


def deep_tensors(config: ModelConfig, dtype) -> dict[str, np.ndarray]:
    """Random weights, rounded to dtype, that keep the size of what they multiply."""
    rng = np.random.default_rng(0)

    def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
        normal = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            return 1 + 0.2 * normal
        return normal if "embed" in name else normal / np.sqrt(shape[-1])

    shapes = parameter_shapes(config).items()
    return {name: values(name, shape).astype(dtype).astype(FLOAT32) for name, shape in shapes}


@pytest.mark.parametrize("host_build", [NumpyDevice], indirect=True)
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_a_deep_model_errs_less_than_one_whose_residual_has_16_bits(host_build, dtype):
    """Roundings of the whole residual, 16 here, add up; those of what is added to it are as many, but smaller, as the
    residual has grown. Leaving out the former should leave some 1 / sqrt(2) of the error, or less."""
    config = ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=256, hidden_size=64, intermediate_size=96, num_layers=8,
        num_heads=1, num_kv_heads=1, head_dim=64, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    tensors = deep_tensors(config, dtype)
    prompt = np.random.default_rng(1).integers(0, 256, 24).tolist()

    def logits(backend) -> np.ndarray:
        """Of a prompt (20 rows: linear) and of tokens after it (linear_small)."""
        driver = Driver(config, load_weights(tensors, config, backend), backend, block_size=8)
        seq = driver.new_sequence()
        steps = (prompt[:20], prompt[20:23], prompt[23:])
        return np.concatenate([driver.step((seq, tokens), all_logits=True)[0] for tokens in steps])

    exact = logits(ReferenceBackend())
    error, plain_error = logits(CudaBackend(host_build[0], dtype)) - exact, logits(RoundingBackend(dtype)) - exact
    assert rms(error) <= 0.75 * rms(plain_error)
    assert np.abs(error).max() <= 0.9 * np.abs(plain_error).max()
    assert 10 * rms(plain_error) < rms(exact)


def test_sampling_from_a_models_logits(host_build):
    """The way of the engine's runner: parameters up, a token a row, log probabilities, and ids down."""
    device, loaded = host_build
    backend = CudaBackend(device, BFLOAT16)
    driver = new_driver("llama", backend)
    prompts = golden("llama")["prompts"]
    host_logits = np.stack(driver.step(*((driver.new_sequence(), prompt) for prompt in prompts)))
    num_rows = len(prompts)
    logits = backend.empty((num_rows, 300), np.float32)
    backend.copy_in(logits, host_logits)
    rows = backend.empty((num_rows + 3,), SAMPLING_ROW)[:num_rows]
    host_rows = make_rows(num_rows, temperature=np.arange(num_rows) / 2, top_k=50, top_p=0.9, seed=3)
    backend.copy_in(rows, host_rows)
    token_ids = backend.empty((num_rows,), np.int32)
    backend.sample(token_ids, logits, rows, 300)
    top_ids, top_logprobs = backend.empty((num_rows, 3), np.int32), backend.empty((num_rows, 3), np.float32)
    ranks = backend.empty((num_rows,), np.int32)
    backend.logprobs(top_ids, top_logprobs, ranks, logits, token_ids, 300)

    expected = np.empty(num_rows, np.int32)
    sampling_reference.sample(expected, host_logits, host_rows, 300)
    assert backend.to_host(token_ids).tolist() == expected.tolist()
    assert backend.to_host(top_ids)[:, 0].tolist() == expected.tolist()
    assert backend.to_host(top_ids)[:, 1].tolist() == host_logits.argmax(axis=1).tolist()
    assert backend.to_host(top_ids)[0, 0] == host_logits[0].argmax()  # temperature 0
    assert (backend.to_host(ranks) >= 1).all()
    assert loaded <= set(needed_kernels(BFLOAT16, 64, sm90=False))


ENGINE_REQUESTS = [  # prompt's length, parameters
    (30, {"temperature": 0, "max_tokens": 9}),
    (9, {"seed": 1, "max_tokens": 12, "n": 3}),  # blocks that are shared and copied
    (21, {"seed": 2, "max_tokens": 5, "logprobs": 2}),
    (7, {"seed": 3, "max_tokens": 20, "stop_token_ids": list(range(0, 300, 3))}),  # ends soon
    (12, {"temperature": 0, "max_tokens": 1, "n": 2}),
    (11, {"seed": 4, "max_tokens": 4, "repetition_penalty": 1.3}),
    (25, {"seed": 5, "max_tokens": 11, "top_k": 20}),
]


def generate(device, *, async_scheduling, enforce_eager) -> list:
    """What requests that come one after another get: chunks beside decodes, stops, and few blocks."""
    backend = CudaBackend(device, BFLOAT16)
    engine = new_engine(
        "llama", backend, num_blocks=14, max_model_len=48, max_num_seqs=6, max_num_tokens=20,
        preemption_mode="recompute", async_scheduling=async_scheduling, enforce_eager=enforce_eager,
        idle_trim_seconds=None,
    )  # fmt: skip
    pending = [
        (str(i), [(7 * i + 3 * j) % 300 for j in range(length)], SamplingParams(ignore_eos=True, **fields))
        for i, (length, fields) in enumerate(ENGINE_REQUESTS)
    ]
    results, num_ahead = {}, 0
    while pending or engine.has_unfinished_requests():
        if pending:
            engine.add_request(*pending.pop(0))
        for output in engine.step():
            if output.finished:
                results[output.request_id] = [
                    (completion.token_ids, completion.finish_reason, completion.stop_reason, completion.logprobs)
                    for completion in output.outputs
                ]
        num_ahead += engine.pipeline.in_flight is not None
    assert (num_ahead > 10) == async_scheduling
    assert engine.stats().num_used_blocks == 0
    assert engine.stats().num_copies > 0
    engine.close()
    return [results[str(i)] for i in range(len(ENGINE_REQUESTS))]


@pytest.mark.parametrize("enforce_eager", [True, False])
def test_two_steps_in_flight_give_the_same_tokens(host_build, enforce_eager):
    device, loaded = host_build
    expected = generate(device, async_scheduling=False, enforce_eager=True)
    assert generate(device, async_scheduling=True, enforce_eager=enforce_eager) == expected
    assert {reason for outputs in expected for _, reason, *_ in outputs} == {"length", "stop"}
    assert ("take_tokens.cu", "take_tokens<128>") in loaded


EDITED = [
    {},
    {"repetition_penalty": 1.5, "presence_penalty": 1.0},
    {"allowed_token_ids": list(range(0, 1000, 9)), "logprobs": 2},
    {"logit_bias": {7: 30.0, 8: -5.0}, "min_tokens": 5, "stop_token_ids": [7]},
    {"logprobs": 3},
    {"frequency_penalty": 0.7, "allowed_token_ids": list(range(1, 1000, 2)), "temperature": 2.0},
    {"logit_bias": {3: 12.0}, "repetition_penalty": 1.1, "logprobs": 0, "temperature": 0},
]


def swap_logits(backend):
    """A logits processor that returns an array of its own. It computes nothing: CuPy itself can't without a GPU."""
    others = backend.empty((1000,), np.float32)
    backend.copy_in(others, random_logits(99, 1000))

    def processor(output, logits):
        assert type(logits) is type(others)
        assert (logits.shape, logits.dtype, logits.flags.c_contiguous) == ((1000,), np.float32, True)
        return others

    return processor


def draw_edited(backend) -> list:
    """Tokens and log probabilities of several steps, for requests that want their logits edited in all ways."""
    vocab_size = 1000
    requests, edited = [], [*EDITED, *({**EDITED[i], "logits_processors": [swap_logits(backend)]} for i in (1, 2))]
    for i, fields in enumerate(edited):
        params, prompt = SamplingParams(max_tokens=None, **fields), [i, 30, 31, 32]
        rules = LogitRules(params, prompt, vocab_size=vocab_size) if LogitRules.asked_by(params) else None
        requests.append(Request(str(i), None, prompt, params, seed=i, arrival_time=0.0, logit_rules=rules))
    sequences = sorted((request.sequences[0] for request in requests), key=Sampler.sort_key)
    for row, seq in enumerate(sequences):
        seq.row = row
    model = replace(Checkpoint(GOLDEN / "llama").config, vocab_size=vocab_size)
    backend.reserve(model, max_num_tokens=9, max_num_seqs=9, max_model_len=100)
    sampler = Sampler(backend, vocab_size=vocab_size, max_num_seqs=9)
    logits = backend.empty((len(sequences), vocab_size + 24), np.float32)
    drawn = []
    for step in range(4):
        rows = [random_logits(10 * step + i, vocab_size + 24) for i in range(len(sequences))]
        backend.copy_in(logits, np.stack(rows))
        token_ids, logprobs = sampler.draw(logits, sequences)()
        drawn.append((token_ids, logprobs))
        for seq, token_id in zip(sequences, token_ids, strict=True):
            seq.token_ids.append(token_id)
    return drawn


@pytest.mark.parametrize("copy_bytes", [4, 1 << 20])
def test_edited_requests_draw_what_the_reference_draws(host_build, monkeypatch, copy_bytes):
    monkeypatch.setattr(sampler_module, "COPY_BYTES", copy_bytes)
    device, loaded = host_build
    steps = draw_edited(CudaBackend(device, BFLOAT16)), draw_edited(ReferenceBackend())
    for (token_ids, logprobs), (expected_ids, expected) in zip(*steps, strict=True):
        assert token_ids == expected_ids
        assert min(token_ids) >= 0
        assert np.array_equal(logprobs.token_ids, expected.token_ids)
        assert np.array_equal(logprobs.ranks, expected.ranks)
        np.testing.assert_allclose(logprobs.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    assert {name.split("<")[0] for _, name in loaded} == {
        "sample_likeliest", "sample_weighed", "sample_top_p", "logprobs_likeliest", "logprobs", "edit_logits",
        "keep_allowed",
    }  # fmt: skip
    assert loaded <= set(needed_kernels(BFLOAT16, 64, sm90=False))


# -- memory and copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("part_bytes", [1 << 20, 20])  # by one thread, and by several
@pytest.mark.parametrize("shape", [(), (1,), (5, 7), (3, 1000), (0, 4)])
def test_copy_in_converts_and_lets_go_of_the_source(monkeypatch, host_build, shape, part_bytes):
    monkeypatch.setattr(cuda, "STAGING_BYTES", 256)  # several turns of the ring
    monkeypatch.setattr(cuda, "SMALL_BYTES", 16)
    monkeypatch.setattr(host_copy, "MIN_PART_BYTES", part_bytes)
    backend = CudaBackend(host_build[0], BFLOAT16)
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = values.astype(BFLOAT16)
    dst = backend.empty(shape, BFLOAT16)
    source = np.array(values)
    backend.copy_in(dst, source)
    source[...] = np.nan
    assert backend.to_host(dst).tobytes() == expected.tobytes()


def test_small_copies_wait_for_no_step(monkeypatch, host_build):
    """A step is launched while the one before it runs: if it had to wait, for its sampling parameters or for a slab's
    address, the device would run dry."""
    monkeypatch.setattr(cuda, "NUM_SMALL", 3)
    device, _ = host_build
    backend = CudaBackend(device, BFLOAT16)
    arrays = [backend.empty((2, 5), np.int32) for _ in range(7)]
    has_run = []
    device.later(lambda: has_run.append("the step before"))
    values = [np.arange(10).reshape(2, 5) + 100 * i for i in range(7)]
    for array, value in list(zip(arrays, values, strict=True))[:3]:
        backend.copy_in(array, value)
    assert not has_run
    for array, value in list(zip(arrays, values, strict=True))[3:]:  # buffers that are filled once more
        backend.copy_in(array, value)
    assert [backend.to_host(array).tolist() for array in arrays] == [value.tolist() for value in values]


@pytest.mark.parametrize(("size", "num_threads"), [(100, 1), (101, 2), (1000, 3)])
def test_large_copies_are_made_by_several_threads(monkeypatch, size, num_threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(3))
    monkeypatch.setattr(host_copy, "MIN_PART_BYTES", 200)
    together = threading.Barrier(num_threads, timeout=60)

    class Source:
        """An array whose parts come when as many threads as are expected have asked for one."""

        def __getitem__(self, part):
            together.wait()
            return values[part]

        def __array__(self, dtype=None, copy=None):
            return values

    values = np.arange(size, dtype=np.float32)
    dst = np.full(size, np.nan, np.float32)
    copier = HostCopier()
    copier.copy(dst, Source())
    copier.close()
    assert np.array_equal(dst, values)


def test_compiling_ahead_names_the_models_kernels(monkeypatch, backend):
    asked = []
    monkeypatch.setattr(cuda, "compile_kernels", lambda kernels, arch: asked.append((kernels, arch)))
    backend.compile(Checkpoint(GOLDEN / "llama").config)
    assert asked == [(list(needed_kernels(BFLOAT16, 64, sm90=False)), "sm_90a")]


def test_copy_in_takes_any_source_and_only_whole_destinations(backend):
    dst = backend.empty((4, 6), np.float32)
    values = np.arange(24, dtype=np.float64).reshape(6, 4)
    backend.copy_in(dst, values.T)
    assert np.array_equal(backend.to_host(dst), values.T)
    with pytest.raises(ValueError, match=r"^dst: expected shape \(6, 4\)"):
        backend.copy_in(dst, values)
    with pytest.raises(ValueError, match=r"^dst: .*not C-contiguous"):
        backend.copy_in(dst[:, :4], values[:4])


def test_fetches_give_what_was_there_when_they_began(backend):
    src = backend.empty((5, 7), np.float32)
    fetches = []
    for i in range(4):  # as many under way at a time
        backend.copy_in(src, np.full((5, 7), i, np.float32))
        fetches.append(backend.fetch(src))
    large = backend.empty((3000,), np.int32)
    backend.copy_in(large, np.arange(3000))
    fetches.append(backend.fetch(large))
    backend.copy_in(src, np.full((5, 7), np.nan))
    first = fetches[0]()
    again = backend.fetch(src)  # takes the first one's buffer
    assert (first == 0).all()
    for i in (3, 1, 2):
        assert np.array_equal(fetches[i](), np.full((5, 7), i, np.float32))
    assert np.array_equal(fetches[4](), np.arange(3000))
    assert np.isnan(again()).all()
    assert (first == 0).all()
    assert backend.fetch(src[:0])().shape == (0, 7)
    assert len(backend._fetches._buffers) == 5


def test_copy_takes_arrays_of_one_shape_and_dtype(backend):
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    src, dst = backend.empty((4, 6), np.float32), backend.empty((9, 6), np.float32)
    backend.copy_in(src, values)
    backend.copy(dst[2:6], src)
    copied = backend.to_host(dst)
    assert np.array_equal(copied[2:6], values)
    assert np.isnan(copied[[0, 1, 6, 7, 8]]).all()
    with pytest.raises(ValueError, match=r"^dst: expected shape \(4, 6\) float32"):
        backend.copy(dst, src)
    with pytest.raises(ValueError, match=r"^dst: expected .* float32"):
        backend.copy(backend.empty((4, 6), np.int32), src)
    with pytest.raises(ValueError, match=r"^src: .*not C-contiguous"):
        backend.copy(backend.empty((4, 3), np.float32), src[:, :3])


def test_blocks_go_to_a_swap_space_and_back(backend):
    layout = KVLayout(3, 2, 8, 64, backend.dtype, blocks_per_slab=4)
    arena = KVArena(layout, backend, 8)
    swap_space = KVArena(replace(layout, blocks_per_slab=2), backend, 6, allocate=backend.empty_host)
    while arena.grow() or swap_space.grow():
        pass
    assert all(type(slab) is np.ndarray for slab in swap_space.slabs)
    values = np.random.default_rng(0).normal(size=layout.slab_shape).astype(BFLOAT16)
    backend.copy_in(arena.slabs[1], values)  # blocks 4 .. 7; the others are NaN

    def copy_blocks(dst, src, *pairs):
        backend.copy_blocks(dst, src, np.array(pairs, np.int32))

    copy_blocks(swap_space, arena, (7, 0), (4, 5))
    copy_blocks(arena, swap_space, (5, 1), (0, 2))
    first_slab = backend.to_host(arena.slabs[0])
    assert first_slab[:, :, 1].tobytes() == values[:, :, 0].tobytes()
    assert first_slab[:, :, 2].tobytes() == values[:, :, 3].tobytes()
    assert np.isnan(first_slab[:, :, [0, 3]].astype(np.float32)).all()
    assert backend.to_host(arena.slabs[1]).tobytes() == values.tobytes()


def random_batch(rng, num_decodes: int, query_lens: list[int], max_blocks: int) -> Batch:
    num_seqs, starts = len(query_lens), np.concatenate([[0], np.cumsum(query_lens)])

    def ids(*shape) -> np.ndarray:
        return rng.integers(2**31, size=shape, dtype=np.int32)

    num_tokens = sum(query_lens)
    return Batch(
        token_ids=ids(num_tokens), positions=ids(num_tokens), slot_mapping=ids(num_tokens),
        query_start_loc=starts.astype(np.int32), seq_lens=ids(num_seqs),
        block_tables=ids(num_seqs, max_blocks + 2)[:, :max_blocks],  # not contiguous
        logits_indices=ids(num_seqs - 1), num_decodes=num_decodes, max_query_len=max(query_lens), max_seq_len=99,
    )  # fmt: skip


def test_upload_batch(backend):
    backend.reserve(Checkpoint(GOLDEN / "llama").config, max_num_tokens=64, max_num_seqs=8, max_model_len=100)
    rng = np.random.default_rng(0)
    for num_decodes, query_lens, max_blocks in [(1, [1, 5], 3), (0, [3, 9, 2], 7), (4, [1] * 4, 1), (0, [64], 13)]:
        batch = random_batch(rng, num_decodes, query_lens, max_blocks)
        uploaded = backend.upload_batch(batch)
        assert (uploaded.num_decodes, uploaded.max_query_len, uploaded.max_seq_len) == (
            num_decodes, max(query_lens), 99
        )  # fmt: skip
        for name in cuda.BATCH_ARRAYS:
            array, expected = getattr(uploaded, name), getattr(batch, name)
            assert np.array_equal(backend.to_host(array), expected), name
            assert array.dtype == np.int32
            assert array.flags.c_contiguous
            assert backend.address(array) % 16 == 0
    for token in range(6):  # without waiting in between: the staging buffers must not be overtaken
        batch = random_batch(rng, 0, [64], 13)
        batch.token_ids[:] = token
        uploaded = backend.upload_batch(batch)
    assert (backend.to_host(uploaded.token_ids) == 5).all()
    with pytest.raises(ValueError, match=r"^batch: larger"):
        backend.upload_batch(random_batch(rng, 0, [64] * 8, 40))


@pytest.mark.parametrize("name", ["_decode_workspace", "_linear_workspace", "_rows_workspace"])
def test_workspaces_start_as_zeros_and_go(backend, name):
    backend.reserve(Checkpoint(GOLDEN / "llama").config, max_num_tokens=64, max_num_seqs=8, max_model_len=100)
    assert not backend.to_host(getattr(backend, name)).any()
    backend.close()
    assert getattr(backend, name) is None


def test_out_of_memory_says_how_much_and_what_to_do(backend, monkeypatch):
    def fail(shape, dtype):
        raise MemoryError

    monkeypatch.setattr(backend._device, "empty", fail)
    expected = r"1\.86 GiB wanted .* 2\.79 GiB of 3\.73 GiB free; lower kv_cache_memory_bytes"
    with pytest.raises(OutOfMemoryError, match=expected) as caught:
        backend.empty((1000, 1_000_000), BFLOAT16)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("status", "raised"), [(2, MemoryError), (46, RuntimeError)])
def test_cudas_own_out_of_memory_is_a_memory_error(status, raised):
    """As it comes from an allocator without a pool."""
    import cupy

    def refuse(num_bytes):
        raise cupy.cuda.runtime.CUDARuntimeError(status)

    device = object.__new__(cuda.CupyDevice)
    device._cupy = cupy
    with cupy.cuda.using_allocator(refuse), pytest.raises(raised):
        device.empty((3, 4), np.float32)


def test_a_capture_has_a_stream_of_its_own_and_ends_whatever_happens():
    events = []

    class Stream:
        def __init__(self, non_blocking):
            assert non_blocking  # else work on the default stream would break the capture

        def __enter__(self):
            events.append("enter")

        def __exit__(self, *_):
            events.append("exit")

        def begin_capture(self):
            events.append("begin")

        def end_capture(self):
            events.append("end")
            return types.SimpleNamespace(launch=lambda: events.append("launch"))

    device = object.__new__(cuda.CupyDevice)
    device._cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(Stream=Stream))
    launch = device.capture(lambda: events.append("function"))
    assert events == ["enter", "begin", "function", "end", "exit"]
    launch()
    launch()
    assert events[5:] == ["launch", "launch"]  # on the current stream

    events.clear()
    with pytest.raises(ZeroDivisionError):
        device.capture(lambda: 1 // 0)
    assert events == ["enter", "begin", "end", "exit"]


def test_a_swap_space_that_cannot_be_had_says_so(backend, monkeypatch):
    def fail(num_bytes):
        raise MemoryError

    monkeypatch.setattr(backend._device, "pinned", fail)
    with pytest.raises(OutOfMemoryError, match=r"^the host can't page-lock 1\.86 GiB .*make the swap space smaller$"):
        backend.empty_host((1000, 1_000_000), BFLOAT16)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8])
def test_other_dtypes_are_refused(runner, dtype):
    with pytest.raises(ValueError, match=f"^dtype: .*bfloat16 or float16; got {np.dtype(dtype)}"):
        CudaBackend(NumpyDevice(runner), dtype)


def test_needed_kernels_are_of_one_dtype_and_head_dim():
    for dtype, other in [(BFLOAT16, "__half"), (FLOAT16, "__nv_bfloat16")]:
        names = [name for _, name in needed_kernels(dtype, 128, sm90=True)]
        assert len(names) == len(set(names)) > 20
        assert not any(other in name for name in names)
        kernels = {name.split("<")[0] for _, name in cuda.registry.instantiations()}
        assert {name.split("<")[0] for name in names} == kernels - {"partial_sums"}  # which no model asks for
        for name in names:
            if name.startswith(("rope", "paged")):
                assert name.split(", ")[1] == "128"
        files = {file for file, _ in needed_kernels(dtype, 128, sm90=False)}
        assert not any(file.endswith("_sm90.cu") for file in files)


def test_a_hopper_gets_its_own_kernels_and_others_the_portable_ones(monkeypatch):
    set_device_info(DeviceInfo("sm_80", num_sms=108, max_shared_bytes=166912))
    try:
        monkeypatch.delenv("CUPAGED_TIER", raising=False)
        assert not use_sm90()
        monkeypatch.setenv("CUPAGED_TIER", "sm90")
        with pytest.raises(ValueError, match=r"^CUPAGED_TIER=sm90 needs a Hopper GPU"):
            use_sm90()
        set_device_info(H100)
        assert use_sm90()
        monkeypatch.delenv("CUPAGED_TIER")
        assert use_sm90()
        monkeypatch.setenv("CUPAGED_TIER", "portable")
        assert not use_sm90()
        monkeypatch.setenv("CUPAGED_TIER", "hopper")
        with pytest.raises(ValueError, match=r"^CUPAGED_TIER: expected portable or sm90, got 'hopper'"):
            use_sm90()
    finally:
        set_device_info(None)


# -- is there a GPU ------------------------------------------------------------------------------------------


class FakeCudaError(RuntimeError):
    def __init__(self, status):
        super().__init__(f"cudaError {status}")
        self.status = status


def fake_cupy(monkeypatch, *, devices=1, error=None, context_error=None, driver=12040):
    """Put a CuPy in place whose runtime fails with `error` (a status) or has `devices` devices, whose contexts fail
    with `context_error`."""

    def get_device_count():
        if error is not None:
            raise FakeCudaError(error)
        return devices

    def get_memory_info():
        if context_error is not None:
            raise FakeCudaError(context_error)
        return 3 << 30, 4 << 30

    runtime = types.SimpleNamespace(
        CUDARuntimeError=FakeCudaError,
        getDeviceCount=get_device_count,
        driverGetVersion=lambda: driver,
        memGetInfo=get_memory_info,
        getDeviceProperties=lambda device: {"name": b"NVIDIA Imaginary 100"},
    )
    device = types.SimpleNamespace(id=0)
    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime, Device=lambda: device))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(cuda, "_driver_is_there", lambda: True)


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        ({"error": 35, "driver": 0}, "no NVIDIA driver is installed"),
        ({"error": 35, "driver": 11040}, "driver is too old: it serves CUDA 11.4"),
        ({"error": 100}, "no NVIDIA GPU was found"),
        ({"devices": 0}, "no NVIDIA GPU was found"),
        ({"error": 999}, "CUDA does not start: cudaError 999"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch, capfd, fake, reason):
    fake_cupy(monkeypatch, **fake)
    found = probe()
    assert not found.usable
    assert reason in found.text
    assert "\n" not in found.text
    with pytest.raises(DeviceError, match=f"^device 'cuda' can't be used: .*{reason}"):
        open_cuda(BFLOAT16)
    assert capfd.readouterr() == ("", "")


def test_hidden_devices_are_mentioned(monkeypatch):
    fake_cupy(monkeypatch, error=100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert probe().text == "no NVIDIA GPU was found (CUDA_VISIBLE_DEVICES is '7')"


def test_an_old_gpu(monkeypatch):
    fake_cupy(monkeypatch)

    def too_old():
        raise DeviceError("the GPU's compute capability is 7.5")

    monkeypatch.setattr(cuda, "device_info", too_old)
    assert probe() == (False, "the GPU's compute capability is 7.5")


def test_a_usable_gpu(monkeypatch):
    fake_cupy(monkeypatch)
    monkeypatch.setattr(cuda, "device_info", lambda: H100)
    assert probe() == (True, "NVIDIA Imaginary 100 (driver for CUDA 12.4)")


def test_a_gpu_that_gives_no_context(monkeypatch):
    fake_cupy(monkeypatch, context_error=46)  # another process has it for itself
    monkeypatch.setattr(cuda, "device_info", lambda: H100)
    assert probe() == (False, "CUDA does not start: cudaError 46")


@pytest.mark.parametrize("status", [0, 100, None])
def test_the_driver_starts_while_cupy_is_imported(monkeypatch, status):
    calls = []

    class Library:
        def __init__(self, name):
            if status is None:
                raise OSError("no such library")
            assert name == "libcuda.so.1"

        def cuInit(self, flags):
            calls.append("cuInit")
            return status

        def cuDevicePrimaryCtxRetain(self, context, device):
            calls.append(f"context of device {device}")
            return 0

    monkeypatch.setattr(cuda.ctypes, "CDLL", Library)
    fake_cupy(monkeypatch)
    with cuda._driver_starts_meanwhile():
        pass
    assert not calls  # CuPy is there: the program may have chosen another device
    monkeypatch.delitem(sys.modules, "cupy")
    with pytest.raises(ImportError), cuda._driver_starts_meanwhile():
        raise ImportError
    assert calls == {0: ["cuInit", "context of device 0"], 100: ["cuInit"], None: []}[status]


def test_without_a_driver_cupy_is_not_imported(monkeypatch):
    monkeypatch.setattr(cuda, "_driver_is_there", lambda: False)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert probe() == (False, "no NVIDIA driver is installed")


def test_no_cupy(monkeypatch):
    monkeypatch.setattr(cuda, "_driver_is_there", lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", None)
    found = probe()
    assert not found.usable
    assert found.text.startswith("CuPy can't be imported")
    assert found.text.endswith("pip install cupy-cuda12x")


def test_the_probe_of_this_machine_prints_nothing(capfd):
    found = probe()
    assert found.text
    assert "\n" not in found.text
    assert capfd.readouterr() == ("", "")
