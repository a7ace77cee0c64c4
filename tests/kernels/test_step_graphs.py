"""Engines whose steps are graphs, without a GPU: what a graph holds of the step that it was captured in shows as
a wrong result in the steps that it runs.

The graphs of host_device.NumpyDevice are the recorded launches, with the places of their arrays.
"""

from __future__ import annotations

import gc
import logging

import model_tools
import numpy as np
import pytest
from host_device import CupyArraysDevice, NumpyDevice, is_value

from cupaged.backends.cuda import CudaBackend
from cupaged.engine.engine import Engine
from cupaged.kernels.checks import BFLOAT16
from cupaged.sampling_params import BeamSearchParams, SamplingParams

MAX_NUM_SEQS = 26
ON_NUMPY = pytest.mark.parametrize("host_build", [NumpyDevice], indirect=True)


def new_engine(name: str, device, **options) -> Engine:
    return model_tools.new_engine(name, CudaBackend(device, BFLOAT16), max_num_seqs=MAX_NUM_SEQS, **options)


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return np.random.default_rng(salt).integers(3, 300, length).tolist()


def drawn(max_tokens: int, **fields) -> SamplingParams:
    return SamplingParams(**{"max_tokens": max_tokens, "seed": max_tokens, "ignore_eos": True, **fields})


class Steps:
    """Runs an engine and keeps, of each step, who drew a token from which logits."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.drawn: list[list[tuple[str, int, bytes]]] = []
        self.outputs: dict = {}
        draw = engine.runner._sampler.draw

        def recording_draw(logits, sequences):
            rows = engine.backend.to_host(logits)
            assert rows.shape == (len(sequences), engine.model.vocab_size)
            assert np.isfinite(rows).all()
            names = [(seq.request.request_id, seq.index) for seq in sequences]
            self.drawn.append([(*name, row.tobytes()) for name, row in zip(names, rows, strict=True)])
            return draw(logits, sequences)

        engine.runner._sampler.draw = recording_draw

    def add(self, request_id: str, prompt: list[int], params: SamplingParams) -> None:
        self.engine.add_request(request_id, prompt, params)

    def run(self, num_steps: int | None = None) -> None:
        while self.engine.has_unfinished_requests() and num_steps != 0:
            for output in self.engine.step():
                self.outputs[output.request_id] = output
            num_steps = None if num_steps is None else num_steps - 1

    def cache(self) -> list[bytes]:
        """What all slabs hold, NaN where nothing was written."""
        arena = self.engine.arena
        return [b"" if slab is None else self.engine.backend.to_host(slab).tobytes() for slab in arena.slabs]


def assert_same(graphs: Steps, eager: Steps) -> None:
    """The same draws from the same bits, and the same cache: padding wrote nowhere."""
    assert graphs.drawn == eager.drawn
    assert graphs.cache() == eager.cache()
    assert graphs.outputs.keys() == eager.outputs.keys()
    for request_id, output in graphs.outputs.items():
        assert output.prompt_logprobs == eager.outputs[request_id].prompt_logprobs
        for completion, expected in zip(output.outputs, eager.outputs[request_id].outputs, strict=True):
            assert completion.token_ids == expected.token_ids
            assert completion.logprobs == expected.logprobs


def both(host_build, run, name="qwen3", **options) -> tuple[Steps, list]:
    """run(Steps) on an engine with graphs and on one without, compared; the former's steps, and its graphs."""
    device = host_build[0]
    eager = Steps(new_engine(name, device, enforce_eager=True, **options))
    run(eager)
    assert not device.graphs
    assert eager.engine.stats().num_graphs == 0
    graphs = Steps(new_engine(name, device, **options))
    run(graphs)
    assert_same(graphs, eager)
    recorded = [ref() for ref in device.graphs]
    assert graphs.engine.stats().num_graphs == len(recorded) > 0
    return graphs, recorded


@pytest.mark.parametrize("name", ["qwen3", "mistral"])  # mistral has a sliding window
@ON_NUMPY
def test_both_edges_of_each_batch_size_give_the_bits_of_eager_steps(host_build, name):
    """Sequences leave, so that each captured size comes full and as empty as it gets; then others join."""
    sizes = [26, 25, 24, 17, 16, 9, 8, 5, 4, 3, 2, 2, 1, 1]  # of the steps after the first

    def run(steps: Steps) -> None:
        for i in range(MAX_NUM_SEQS):
            max_tokens = 1 + sum(i < size for size in sizes)
            steps.add(f"down {i}", prompt_of(1 + i % 11, i), drawn(max_tokens, temperature=i % 2))
        steps.run()
        for i in range(2):
            steps.add(f"up {i}", prompt_of(3, 100 + i), drawn(5 - i))
            steps.run(2)  # its prompt, and a step of decodes
        steps.run()

    graphs, recorded = both(host_build, run, name)
    assert [len(step) for step in graphs.drawn[1 : 1 + len(sizes)]] == sizes
    assert len(recorded) == len({1, 2, 4, 8, 16, 24, 26})
    assert all(graph.num_runs > 0 for graph in recorded)


@ON_NUMPY
def test_prompt_logprobs_between_graphs(host_build):
    """What was generated by graphs, given as a prompt, has the log probabilities that it was generated with. They are
    taken 26 tokens at a time, while others decode."""

    def run(steps: Steps) -> None:
        steps.add("a", prompt_of(30), drawn(10, logprobs=1))
        steps.run()
        for name in "bc":
            steps.add(name, prompt_of(30) + steps.outputs["a"].outputs[0].token_ids, drawn(4, prompt_logprobs=1))
            steps.run(2)
        steps.run()

    graphs, _ = both(host_build, run)
    a, b, c = (graphs.outputs[name] for name in "abc")
    assert b.prompt_logprobs == c.prompt_logprobs
    assert len(b.prompt_logprobs) == 40
    for token_id, entry, expected in zip(
        a.outputs[0].token_ids, b.prompt_logprobs[30:], a.outputs[0].logprobs, strict=True
    ):
        assert entry[token_id].logprob == pytest.approx(expected[token_id].logprob, abs=0.1)  # prefill and decode, bf16


@pytest.mark.parametrize("host_build", [CupyArraysDevice], indirect=True)
def test_sequences_grow_over_blocks_and_lengths(host_build):
    """Over the edges of blocks, of a split (256 keys) and of the captured length, the cache growing meanwhile."""

    def run(steps: Steps) -> None:
        steps.add("long", prompt_of(252), drawn(10))
        for i in range(3):
            steps.add(str(i), prompt_of(7 + 64 * i, i), drawn(12))
        steps.run(4)
        num_slabs.append(steps.engine.arena.num_slabs)
        steps.run()
        num_slabs.append(steps.engine.arena.num_slabs)

    num_slabs: list[int] = []
    _, recorded = both(host_build, run, num_blocks=128)
    assert num_slabs[0] < num_slabs[1]
    assert num_slabs[:2] == num_slabs[2:]
    num_splits = [launch.grid[0] for graph in recorded for launch in graph.launches if "paged_decode" in launch.name]
    assert set(num_splits) == {1, 2}  # of up to 256 tokens, and of up to 400


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
@ON_NUMPY
def test_steps_with_prompts(host_build, name):
    """Prompts in chunks beside decodes, several at a time, over the captured lengths; the same shapes come with other
    numbers of tokens and sequences."""

    def run(steps: Steps) -> None:
        for i in range(3):
            steps.add(f"first {i}", prompt_of(9 + i, i), drawn(30))
        steps.run(2)
        for i, length in enumerate([300, 45, 80, 3, 31, 290]):
            steps.add(str(i), prompt_of(length, 10 + i), drawn(3 + i, n=1 + i % 2, logprobs=i))
            steps.run(3)
        steps.run()

    _, recorded = both(host_build, run, name, num_blocks=128, max_num_tokens=64, long_prefill_token_threshold=24)
    with_prompts = [g for g in recorded if any("paged_prefill" in launch.name for launch in g.launches)]
    assert sum(graph.num_runs for graph in with_prompts) > 10


@ON_NUMPY
def test_beams_beside_prompts_and_samples(host_build):
    """Which beam goes on from which, and its copied block, are put into batches that are padded already."""

    def run(steps: Steps) -> None:
        for i in range(3):
            steps.add(f"beams {i}", prompt_of(12 + i, i), BeamSearchParams(2 + i, 20, ignore_eos=True))
            steps.run(2)
            steps.add(f"samples {i}", prompt_of(40 + i, 10 + i), drawn(12, n=2, temperature=1))
            steps.run(2)
        steps.run()
        assert steps.engine.stats().num_copies > 0

    _, recorded = both(host_build, run, max_num_tokens=64, long_prefill_token_threshold=24)
    assert sum(graph.num_runs for graph in recorded) > 10


@ON_NUMPY
def test_swapped_and_edited_sequences(host_build):
    def run(steps: Steps) -> None:
        for i, fields in enumerate([{"repetition_penalty": 1.3}, {"n": 3}, {"logit_bias": {7: 3.0}, "logprobs": 2}]):
            steps.add(str(i), prompt_of(8 * i + 4, i), drawn(10, **fields))
        steps.run()
        assert steps.engine.stats().num_swaps > 0

    sizes = {"num_blocks": 8, "max_model_len": 60, "swap_space_bytes": 1 << 20}
    _, recorded = both(host_build, run, preemption_mode="swap", **sizes)
    assert sum(graph.num_runs for graph in recorded) > 10


@ON_NUMPY
def test_the_cache_may_move_under_the_graphs(host_build):
    """Slabs are given back and others taken, elsewhere; what the old ones hold then is NaN."""

    def run(steps: Steps) -> None:
        arena, backend = steps.engine.arena, steps.engine.backend
        for i in range(3):
            steps.add(f"before {i}", prompt_of(20, i), drawn(5))
        steps.run()
        graphs_before.append(steps.engine.stats().num_graphs)
        old = [slab for slab in arena.slabs if slab is not None]
        steps.engine.trim()
        assert arena.num_slabs == 0
        for slab in old:
            backend.copy_in(slab, np.full(slab.shape, np.nan, slab.dtype))
        for i in range(3):
            steps.add(f"after {i}", prompt_of(30, 10 + i), drawn(7))
        steps.run()
        assert arena.num_slabs > 0
        assert {backend.address(slab) for slab in old}.isdisjoint(backend.address(slab) for slab in arena.slabs)
        graphs_after.append(steps.engine.stats().num_graphs)

    graphs_before, graphs_after = [], []
    _, recorded = both(host_build, run)
    assert graphs_before == graphs_after == [0, 1]  # the same ones went on
    assert recorded[0].num_runs >= 8


@ON_NUMPY
def test_no_launch_holds_a_slabs_address(host_build):
    """In graphs of decodes, of a prompt's chunk, and of both."""
    device = host_build[0]
    steps = Steps(new_engine("qwen3", device, max_num_tokens=16))
    for i in range(2):
        steps.add(str(i), prompt_of(60, i), drawn(8))
    steps.run()
    arena, address = steps.engine.arena, steps.engine.backend.address
    ranges = [(address(slab), address(slab) + slab.nbytes) for slab in arena.slabs]
    kinds = set()
    for graph in [ref() for ref in device.graphs]:
        names = [launch.name.partition("<")[0] for launch in graph.launches]
        attention = {name for name in names if name.startswith("paged")}
        kinds.add(frozenset(attention))
        num_structs = 0
        for launch in graph.launches:
            for arg in launch.args:
                if not is_value(arg):
                    assert not any(start <= arg.ctypes.data < end for start, end in ranges), launch.name
                elif arg.dtype.names is not None and "slabs" in arg.dtype.names:
                    num_structs += 1
                    numbers = [int(arg[name]) for name in arg.dtype.names]
                    assert not any(start <= number < end for number in numbers for start, end in ranges), launch.name
                    assert arg["slabs"] == arena.slab_table_address
        assert num_structs == (1 + len(attention)) * steps.engine.model.num_layers  # rope_and_store_kv has one
    assert kinds == {
        frozenset(kind) for kind in (["paged_decode"], ["paged_prefill"], ["paged_decode", "paged_prefill"])
    }


@ON_NUMPY
def test_a_device_that_captures_nothing(host_build, monkeypatch, caplog):
    device = host_build[0]

    def run(steps: Steps) -> None:
        for i in range(2):
            steps.add(str(i), prompt_of(7 + i, i), drawn(3 + i))
        steps.run()

    def refuse(function):
        raise RuntimeError("not permitted")

    eager = Steps(new_engine("qwen3", device, enforce_eager=True))
    run(eager)
    monkeypatch.setattr(device, "capture", refuse)
    graphs = Steps(new_engine("qwen3", device))
    with caplog.at_level(logging.WARNING):
        run(graphs)
    assert_same(graphs, eager)
    assert [record.getMessage() for record in caplog.records] == [
        "steps run without further CUDA graphs, as one can't be captured: not permitted"
    ]


@ON_NUMPY
def test_closing_frees_the_graphs(host_build):
    device = host_build[0]
    steps = Steps(new_engine("qwen3", device))
    steps.add("a", prompt_of(9), drawn(8))
    steps.run()
    engine, [graph] = steps.engine, device.graphs
    del steps
    assert graph() is not None
    gc.disable()
    try:
        engine.close()
        assert graph() is None
    finally:
        gc.enable()
