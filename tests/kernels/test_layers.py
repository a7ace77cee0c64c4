"""Launches that are made after those of the first layer, compared with what the launchers would have launched."""

import ctypes
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from host_device import H100, CupyArraysDevice
from model_tools import MODELS, mixed_steps, new_driver

from cupaged.backends import cuda
from cupaged.backends.cuda import CudaBackend
from cupaged.kernels import compile as compiler
from cupaged.kernels import launch
from cupaged.kernels import tensor_map as tensor_map_module
from cupaged.kernels.checks import BFLOAT16, FLOAT32
from cupaged.kernels.compile import NULL, load_kernel
from cupaged.kernels.device import set_device_info
from cupaged.kernels.launch import KernelLauncher
from cupaged.kernels.layers import Layers
from cupaged.kernels.rms_norm import rms_norm
from cupaged.kernels.tensor_map import TENSOR_MAP, tensor_map
from cupaged.memory.arena import KVArena, KVLayout
from cupaged.models.parameters import LayerWeights
from host.build import encode_tensor_map
from kernel_tools import poisoned


class Driver:
    """Stands in for the driver's library: notes all launches, and carries out none."""

    def __init__(self):
        self.launches = []
        self.num_arguments = {}  # by function

    def cuLaunchKernelEx(self, config, function, parameters, extra):
        count = self.num_arguments[function.value]
        addresses = list((ctypes.c_uint64 * count).from_address(parameters.value))
        ends = [*addresses[1:], addresses[-1] + 8]  # arguments lie one after another; of the last, eight bytes
        arguments = [ctypes.string_at(start, end - start) for start, end in zip(addresses, ends, strict=True)]
        self.launches.append((function.value, ctypes.string_at(config.value, 56), arguments))
        return 0


class Launcher(KernelLauncher):
    """Tells the driver how many arguments there are."""

    def __init__(self, driver, raw_kernel, *, overlaps):
        super().__init__(raw_kernel, overlaps=overlaps)
        self._driver = driver

    def prepare(self, grid, block, args, shared_mem=0):
        self._driver.num_arguments[self._raw_kernel.kernel.ptr] = len(args)
        return super().prepare(grid, block, args, shared_mem)

    def __call__(self, grid, block, args, shared_mem=0):
        self._driver.num_arguments[self._raw_kernel.kernel.ptr] = len(args)
        super().__call__(grid, block, args, shared_mem)


class Function:
    def __init__(self, address):
        self.ptr = address


@pytest.fixture
def driver(monkeypatch):
    """Kernels are launched by this driver, with CuPy's arrays."""
    cupy = pytest.importorskip("cupy")
    driver, kernels = Driver(), {}

    def load(file, name):
        if (file, name) not in kernels:
            raw_kernel = SimpleNamespace(kernel=Function(1 + len(kernels)))
            kernels[file, name] = Launcher(driver, raw_kernel, overlaps="small" in file)
        return kernels[file, name]

    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda: SimpleNamespace(ptr=77))
    monkeypatch.setattr(launch, "driver", lambda: driver)
    monkeypatch.setattr(compiler, "_load", load)
    monkeypatch.setattr(cuda, "load_kernels", lambda kernels: None)
    monkeypatch.setattr(tensor_map_module, "_encode", encode_tensor_map)
    set_device_info(H100)
    yield driver
    set_device_info(None)


@pytest.fixture
def backend():
    memory = SimpleNamespace(empty=poisoned)
    return CudaBackend(CupyArraysDevice(memory), BFLOAT16)


def launches_of(driver, model_driver, name):
    driver.launches.clear()
    mixed_steps(model_driver, name)
    return list(driver.launches)


@pytest.mark.parametrize("tier", ["portable", "sm90"])
@pytest.mark.parametrize("name", MODELS)
def test_other_layers_get_the_bytes_that_the_launchers_would_hand_over(driver, backend, monkeypatch, name, tier):
    monkeypatch.setenv("CUPAGED_TIER", tier)
    model_driver = new_driver(name, backend)
    again = launches_of(driver, model_driver, name)

    with monkeypatch.context() as patch:
        patch.setattr(Layers, "launch_others", lambda *_: False)
        model_driver.free = np.random.default_rng(0).permutation(64).tolist()
        plain = launches_of(driver, model_driver, name)
    assert again == plain
    num_layers = model_driver.decoder.config.num_layers
    assert num_layers >= 2
    # One step has decodes and a prompt; five have so few rows that norms are part of products; five only decode, which
    # Hopper's attention rotates for.
    rotations = 5 * num_layers if tier == "sm90" else 0
    assert len(plain) == 8 * (8 * num_layers + 4) + num_layers - 5 * (2 * num_layers + 1) - rotations


def norms(backend, num_layers, **others) -> list[LayerWeights]:
    def array():
        return backend.empty((8,), BFLOAT16)

    return [LayerWeights(array(), *(array() for _ in range(5)), **others) for _ in range(num_layers)]


def new_arena(backend, num_layers) -> KVArena:
    return KVArena(KVLayout(num_layers, 1, 16, 64, BFLOAT16, 1), backend, 1)


def run_norms(backend, layers, weight_of) -> list[int]:
    """The layers that were run by `run`."""
    out, x, calls = backend.empty((3, 8), BFLOAT16), backend.empty((3, 8), FLOAT32), []

    def run(index, layer):
        calls.append(index)
        rms_norm(out, x, weight_of(index, layer), 1e-5)

    backend.for_each_layer(layers, new_arena(backend, len(layers)), run)
    return calls


def weight_addresses(driver) -> list[int]:
    return [int.from_bytes(arguments[2], "little") for _, _, arguments in driver.launches]


def test_only_the_first_layer_is_run(driver, backend):
    layers = norms(backend, 4)
    assert run_norms(backend, layers, lambda _, layer: layer.post_attention_norm) == [0]
    assert weight_addresses(driver) == [layer.post_attention_norm.data.ptr for layer in layers]
    driver.launches.clear()
    assert run_norms(backend, layers[:1], lambda _, layer: layer.down) == [0]
    assert weight_addresses(driver) == [layers[0].down.data.ptr]
    driver.launches.clear()
    shared = norms(backend, 3)
    shared[2].o = shared[0].o
    run_norms(backend, shared, lambda _, layer: layer.o)
    assert weight_addresses(driver) == [layer.o.data.ptr for layer in shared]


def test_each_layer_is_run_where_its_arguments_do_not_follow_from_the_first_ones(driver, backend):
    layers = norms(backend, 3)
    rows = [backend.empty((2, 8), BFLOAT16) for _ in layers]
    for layer, two in zip(layers, rows, strict=True):
        layer.qkv = two
    for weight_of in (
        lambda index, _: layers[(index + 1) % 3].input_norm,  # another layer's
        lambda _, layer: layer.qkv[1],  # a part
    ):
        driver.launches.clear()
        assert run_norms(backend, layers, weight_of) == [0, 1, 2]
        assert weight_addresses(driver) == [weight_of(i, layer).data.ptr for i, layer in enumerate(layers)]

    unlike = norms(backend, 3)
    unlike[1].gate_up = backend.empty((16,), BFLOAT16)
    assert run_norms(backend, unlike, lambda _, layer: layer.down) == [0, 1, 2]
    some_bias = norms(backend, 3)
    some_bias[1].qkv_bias = backend.empty((8,), BFLOAT16)
    assert run_norms(backend, some_bias, lambda _, layer: layer.down) == [0, 1, 2]


def test_descriptions_of_weights_are_those_of_each_layers_own(driver, backend, monkeypatch):
    def encode(address, rows, columns, dtype, box_rows, l2_bytes):
        return np.array((np.array([box_rows, address, rows, *[columns] * 12, l2_bytes]),), TENSOR_MAP)

    monkeypatch.setattr(tensor_map_module, "_encode", encode)
    layers, x = norms(backend, 3), backend.empty((5, 64), BFLOAT16)
    for layer in layers:
        layer.qkv, layer.o = (backend.empty((32, 64), BFLOAT16) for _ in range(2))

    def described(arrays_of):
        """The words that tell of the arrays, for each launch."""
        driver.launches.clear()

        def run(_, layer):
            args = tuple(tensor_map(array, 16, 128) for array in arrays_of(layer))
            load_kernel("rms_norm.cu", "any")((1,), (32,), (*args, NULL))

        backend.for_each_layer(layers, new_arena(backend, 3), run)
        return [
            [np.frombuffer(a, np.uint64)[[0, 1, 2, 3, -1]].tolist() for a in args[:-1]]
            for _, _, args in driver.launches
        ]

    expected = [[[16, a.data.ptr, *a.shape, 128] for a in (x, layer.o, layer.qkv)] for layer in layers]
    assert described(lambda layer: (x, layer.o, layer.qkv)) == expected
    expected = [[[16, layer.qkv.data.ptr, 8, 64, 128]] for layer in layers]
    assert described(lambda layer: (layer.qkv[:8],)) == expected


def test_a_failed_launch_of_a_later_layer_is_an_error(driver, backend, monkeypatch):
    import cupy

    class CUDADriverError(RuntimeError):
        pass

    monkeypatch.setattr(cupy.cuda.driver, "CUDADriverError", CUDADriverError)
    statuses = iter([0, 0, 719])
    monkeypatch.setattr(driver, "cuLaunchKernelEx", lambda *_: next(statuses), raising=False)
    with pytest.raises(CUDADriverError, match="719"):
        run_norms(backend, norms(backend, 4), lambda _, layer: layer.input_norm)


def test_launches_are_noted_by_thread_while_that_is_asked_for(driver, backend):
    out, x, weight = backend.empty((3, 8), BFLOAT16), backend.empty((3, 8), FLOAT32), backend.empty((8,), BFLOAT16)
    with compiler.noted_launches() as launches:
        rms_norm(out, x, weight, 1e-5)
        with pytest.raises(ValueError, match="out: dtype"):
            rms_norm(x, x, weight, 1e-5)
        other = threading.Thread(target=rms_norm, args=(out, x, weight, 1e-5))
        other.start()
        other.join()
    rms_norm(out, x, weight, 1e-5)
    [noted] = launches
    assert noted.grid == (3,)
    assert [arg.data.ptr for arg in noted.args[:3]] == [array.data.ptr for array in (out, x, weight)]
    assert len(driver.launches) == 3
