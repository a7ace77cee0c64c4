"""What `cupaged bench kernels` launches and counts, without a GPU."""

import sys
import types
from dataclasses import replace

import numpy as np
import pytest

from cupaged.backends import cuda
from cupaged.backends.cuda import CudaBackend
from cupaged.backends.reference import ReferenceBackend
from cupaged.benchmark import kernel_cases
from cupaged.benchmark.kernel_cases import FAMILIES, Case, KernelCases
from cupaged.benchmark.kernel_timing import GraphTimer, Timing, measure_ceilings, time_cases
from cupaged.config import ModelConfig
from cupaged.errors import OutOfMemoryError
from cupaged.kernels.checks import BFLOAT16
from cupaged.kernels.compile import load_from_cubin, set_loader
from cupaged.kernels.device import DeviceInfo, set_device_info
from cupaged.kernels.registry import instantiations

MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=384,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=512,
)
SIZES = {"rows": (1, 5, 300), "decode": [(1, 40), (3, 17)], "prefill": [(2, 33)]}


@pytest.fixture(autouse=True)
def small_pool(monkeypatch):
    """Random values are made quickly, and arrays are filled in several pieces."""
    monkeypatch.setattr(kernel_cases, "POOL_SIZE", 1000)
    kernel_cases._random_pool.cache_clear()
    yield
    kernel_cases._random_pool.cache_clear()


def cases_of(backend, model=MODEL, **changes):
    sizes = {"block_size": 16, "l2_bytes": 100_000, **SIZES, **changes}
    return list(KernelCases(backend, model, **sizes).makers())


def by_shape(backend, model=MODEL, **changes):
    return {(family, (case := make()).shape): case for family, make in cases_of(backend, model, **changes)}


def test_every_case_runs_on_all_its_sets():
    families = set()
    for family, make in cases_of(ReferenceBackend(), replace(MODEL, qk_norm=True)):
        families.add(family)
        case = make()
        for i in range(min(case.num_sets, 3) + 1):
            case.launch(i)
        case.launch(case.num_sets - 1)
    assert families == set(FAMILIES)


class HostDevice:
    """CupyDevice over NumPy arrays, for launches that only check their arguments."""

    description = "fake"

    def empty(self, shape, dtype):
        return np.zeros(shape, dtype)

    def pinned(self, num_bytes):
        return np.zeros(num_bytes, np.uint8)

    def copy(self, dst, src):
        dst[...] = src

    def start_copy(self, dst, src):
        dst.reshape(-1).view(np.uint8)[:] = src
        return lambda: None

    def to_host(self, src):
        return src.copy()

    def address(self, array):
        return array.ctypes.data

    def memory_info(self):
        return 1 << 30, 1 << 30


@pytest.fixture
def launches(monkeypatch):
    """A CudaBackend, and the (file, name) of the kernels that were loaded in place of being launched."""
    loaded = []

    def load(file, name):
        loaded.append((file, name))
        return lambda grid, block, args, shared_mem=0: None

    set_loader(load)
    set_device_info(DeviceInfo("sm_90a", num_sms=132, max_shared_bytes=232448))
    monkeypatch.setenv("CUPAGED_TIER", "portable")
    monkeypatch.setattr(cuda, "load_kernels", lambda kernels: None)
    yield CudaBackend(HostDevice(), BFLOAT16), loaded
    set_device_info(None)
    set_loader(load_from_cubin)


def fake_timer(launch, num_sets):
    for i in range(num_sets + 1):
        launch(i)
    return Timing([2.0, 4.0, 3.0], host_us=7.0)


def test_the_launchers_take_what_every_case_gives_them(launches):
    backend, loaded = launches
    said = []
    rows = time_cases(cases_of(backend), fake_timer, {"read": 1000.0, "copy": 500.0}, said.append)
    assert {row["family"] for row in rows} == set(FAMILIES)
    assert len(said) == len(rows)
    assert {file.removesuffix(".cu") for file, _ in set(loaded)} >= {"linear_small", *FAMILIES}
    assert set(loaded) <= set(instantiations())
    for row in rows:
        assert row["us"] == {"median": 3.0, "min": 2.0, "max": 4.0, "count": 3}
        assert row["host_us"] == 7.0
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / 3e-6 / 1e9)
        assert row["of_ceiling"] == pytest.approx(row["gb_per_s"] / {"read": 1000, "copy": 500}[row["ceiling"]])
        assert (row["tflop_per_s"] is None) == (row["flops"] == 0)


def test_ceilings(launches):
    backend, loaded = launches
    ceilings = measure_ceilings(backend, fake_timer, num_bytes=12_000)
    assert ceilings == pytest.approx({"read": 12_000 / 3e-6 / 1e9, "copy": 2 * 12_000 / 3e-6 / 1e9})
    assert {file for file, _ in loaded} == {"partial_sums.cu"}


def test_bytes_and_flops_are_those_of_the_shapes(launches):
    """bfloat16 everywhere but for the residual and the logits, which are float32."""
    cases = by_shape(launches[0])
    qkv = cases["linear", "qkv 512x256, 5 rows"]
    assert (qkv.bytes_read, qkv.bytes_written) == (2 * (512 * 256 + 5 * 256), 2 * 5 * 512)
    assert qkv.flops == 2 * 5 * 512 * 256
    head = cases["linear", "lm_head 1000x256, 1 rows"]
    assert head.bytes_written == 4 * 1000
    gate_up = cases["linear", "gate_up 768x256, 5 rows"]
    assert (gate_up.bytes_read, gate_up.bytes_written) == (2 * (768 * 256 + 5 * 256), 2 * 5 * 384)
    down = cases["linear", "down 256x384, 5 rows"]
    assert down.bytes_read == 2 * (256 * 384 + 5 * 384) + 4 * 5 * 256  # the residual, too
    assert down.bytes_written == 4 * 5 * 256
    decode = cases["paged_decode", "3 x 17"]
    assert decode.bytes_read == 2 * (3 * 17 * 2 * 2 * 64) + 2 * (3 * 4 * 64)
    assert decode.flops == 3 * 17 * 4 * 64 * 4
    prefill = cases["paged_prefill", "2 x 33"]
    assert prefill.flops == 2 * sum(range(1, 34)) * 4 * 64 * 4
    assert prefill.bytes_written == 2 * (2 * 33 * 4 * 64)
    norm = cases["rms_norm", "300 rows"]
    assert (norm.bytes_read, norm.bytes_written) == (4 * 300 * 256 + 2 * 256, 2 * 300 * 256)
    greedy = cases["sampler", "greedy, 5 rows"]
    assert greedy.bytes_read == 4 * 5 * 1000 + 5 * 32
    assert ("sampler", "greedy, 256 rows") in cases  # no step wants more logits
    assert ("sampler", "greedy, 300 rows") not in cases


def test_a_window_bounds_what_attention_reads(launches):
    cases = by_shape(launches[0], replace(MODEL, sliding_window=10))
    decode = cases["paged_decode", "3 x 17"]
    assert decode.bytes_read == 2 * (3 * 10 * 2 * 2 * 64) + 2 * (3 * 4 * 64)
    assert decode.flops == 3 * 10 * 4 * 64 * 4
    prefill = cases["paged_prefill", "2 x 33"]
    assert prefill.bytes_read == 2 * (2 * 33 * 2 * 2 * 64) + 2 * (2 * 33 * 4 * 64)
    assert prefill.flops == 2 * (sum(range(1, 11)) + 23 * 10) * 4 * 64 * 4


def test_what_is_read_does_not_stay_in_l2(launches):
    cases = by_shape(launches[0], l2_bytes=1_000_000)
    weight_bytes = 2 * 512 * 256
    assert cases["linear", "qkv 512x256, 1 rows"].num_sets == -(-4_000_000 // weight_bytes)
    assert cases["paged_decode", "3 x 17"].num_sets == kernel_cases.MAX_SETS
    assert by_shape(launches[0], l2_bytes=1000)["linear", "qkv 512x256, 1 rows"].num_sets == 1


def test_a_case_that_does_not_fit_is_left_out():
    def too_large():
        raise OutOfMemoryError("9 TB wanted")

    small = Case("small", lambda i: None, 1, bytes_read=3000, bytes_written=0)
    said = []
    rows = time_cases(
        [("linear", too_large), ("rope", lambda: small)], fake_timer, {"read": 2.0, "copy": 1.0}, said.append
    )
    assert [row["shape"] for row in rows] == ["small"]
    assert rows[0]["of_ceiling"] == pytest.approx(0.5)
    assert said[0] == "linear: left out: 9 TB wanted"


# -- the timer, over a CuPy that keeps account -------------------------------------------------------------------


class FakeGpu:
    """Each launch takes 5 us, at once or in a graph."""

    def __init__(self):
        self.now = 0.0  # us
        self.captured = None
        self.launched = []

    def launch(self, i):
        if self.captured is not None:
            self.captured.append(i)
        else:
            self.launched.append(i)
            self.now += 5.0


def fake_cupy(gpu):
    class Stream:
        def __init__(self, non_blocking):
            assert non_blocking  # the default stream can't be captured

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def synchronize(self):
            assert gpu.captured is None

        def begin_capture(self):
            gpu.captured = []

        def end_capture(self):
            launches, gpu.captured = gpu.captured, None
            return Graph(launches)

    class Graph:
        def __init__(self, launches):
            self.launches = launches

        def launch(self):
            for i in self.launches:
                gpu.launch(i)

    class Event:
        def record(self, stream):
            self.time = gpu.now

        def synchronize(self):
            pass

    class Device:
        attributes = types.MappingProxyType({"L2CacheSize": 123})

        def synchronize(self):
            pass

    def get_elapsed_time(begin, end):
        return (end.time - begin.time) / 1e3  # ms, as CuPy has it

    return types.SimpleNamespace(
        cuda=types.SimpleNamespace(Stream=Stream, Event=Event, Device=Device, get_elapsed_time=get_elapsed_time)
    )


def test_graph_timer(monkeypatch):
    gpu = FakeGpu()
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(gpu))
    timer = GraphTimer(repeats=3)
    assert timer.l2_bytes == 123
    timing = timer(gpu.launch, num_sets=7)
    assert timing.us == pytest.approx([5.0, 5.0, 5.0])
    assert timing.host_us > 0
    in_graph = gpu.launched[1 + 2 * 7 :]
    assert len(in_graph) % (2 * 3 * 7) == 0  # whole rounds over the sets, each graph twice
    assert 2000 <= len(in_graph) / 6 * 5 <= 2000 + 7 * 5
    assert in_graph[:14] == [*range(14)]
