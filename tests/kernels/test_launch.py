"""What launchers of loaded kernels hand over to the driver."""

import ctypes
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from cupaged.kernels import compile as compiler
from cupaged.kernels import launch
from cupaged.kernels.compile import NULL, SOURCE_DIR
from cupaged.kernels.device import DeviceInfo, set_device_info
from cupaged.kernels.launch import KernelLauncher, overlaps
from cupaged.kernels.paged_kv import PAGED_KV


@pytest.fixture
def driver(monkeypatch):
    """Stands in for the driver's library, on a stream at address 77: its calls, each what the documentation of
    cuLaunchKernelEx says of the bytes that it gets."""
    calls = []

    def read(address, offset, kind):
        return kind.from_address(address + offset).value

    def launch_kernel(config, function, parameters, extra):
        uint, pointer = ctypes.c_uint, ctypes.c_void_p
        config, pointers = config.value, (pointer * len(sizes)).from_address(parameters.value)
        attributes, num_attributes = read(config, 40, pointer), read(config, 48, uint)
        calls.append(
            SimpleNamespace(
                grid=tuple(read(config, 4 * i, uint) for i in range(3)),
                block=tuple(read(config, 12 + 4 * i, uint) for i in range(3)),
                shared_mem=read(config, 24, uint),
                stream=read(config, 32, pointer),
                attributes=[(read(attributes, 72 * i, uint), read(attributes, 72 * i + 8, ctypes.c_int))
                            for i in range(num_attributes)],
                function=function.value,
                parameters=[ctypes.string_at(pointers[i], size) for i, size in enumerate(sizes)],
                extra=extra,
            )
        )  # fmt: skip
        return 0

    sizes = []
    cupy = pytest.importorskip("cupy")
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda: SimpleNamespace(ptr=77))
    monkeypatch.setattr(launch, "driver", lambda: SimpleNamespace(cuLaunchKernelEx=launch_kernel))
    return calls, sizes


class Function:
    """As CuPy's."""

    def __init__(self, address: int):
        self.ptr = address


def raw_kernel(address: int) -> SimpleNamespace:
    return SimpleNamespace(kernel=Function(address))


def test_a_cubin_is_loaded_before_the_first_launch():
    class RawKernel:
        loads = 0

        @property
        def kernel(self):
            self.loads += 1

    raw_kernel = RawKernel()
    KernelLauncher(raw_kernel, overlaps=False)
    assert raw_kernel.loads == 1


def test_the_shared_memory_limit_follows_the_launches_on_each_device(driver):
    class RawKernel:
        kernel = Function(1)
        limits: tuple = ()

        def __setattr__(self, name, value):
            if name == "max_dynamic_shared_size_bytes":
                self.limits += (value,)
            else:
                super().__setattr__(name, value)

    raw_kernel = RawKernel()
    kernel = KernelLauncher(raw_kernel, overlaps=False)
    requests = [0, 48 << 10, 64 << 10, 50 << 10, 64 << 10, 100 << 10]
    for shared_mem in requests:
        kernel((1,), (32,), (), shared_mem=shared_mem)
    assert raw_kernel.limits == (64 << 10, 100 << 10)
    assert [call.shared_mem for call in driver[0]] == requests
    raw_kernel.kernel = Function(2)  # the second device's
    kernel((1,), (32,), (), shared_mem=64 << 10)
    assert raw_kernel.limits == (64 << 10, 100 << 10, 64 << 10)
    assert [call.function for call in driver[0]] == [1] * len(requests) + [2]


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_launch_is_what_the_driver_documents(driver, overlaps):
    calls, sizes = driver
    array = SimpleNamespace(data=SimpleNamespace(ptr=0x7F0012345678))  # as a cupy.ndarray has it
    kv = np.array((1, 2, 3, 4, 5), PAGED_KV)
    sizes += [8, 8, 32, 4, 4]
    kernel = raw_kernel(123456789)
    args = (array, NULL, kv, np.int32(-3), np.float32(0.5))
    KernelLauncher(kernel, overlaps=overlaps)((5, 2), (128,), args, shared_mem=70_000)

    [call] = calls
    assert (call.grid, call.block, call.shared_mem, call.stream) == ((5, 2, 1), (128, 1, 1), 70_000, 77)
    assert call.attributes == (
        [(6, 1)] if overlaps else []
    )  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, allowed
    assert (call.function, call.extra) == (123456789, None)
    expected = [np.uint64(0x7F0012345678), np.uint64(0), kv, np.int32(-3), np.float32(0.5)]
    assert call.parameters == [value.tobytes() for value in expected]
    assert kernel.max_dynamic_shared_size_bytes == 70_000


def test_a_prepared_launch_takes_what_its_words_hold_when_it_is_called(driver):
    calls, sizes = driver
    sizes += [4, 32, 8]
    kv, array = np.array((1, 2, 3, 4, 5), PAGED_KV), SimpleNamespace(data=SimpleNamespace(ptr=1 << 40))
    prepared = KernelLauncher(raw_kernel(1), overlaps=True).prepare((7,), (32,), (np.int32(9), kv, array))
    assert not calls
    assert prepared.call() == 0
    prepared.words[prepared.starts[1] + 1] = 22  # k_offset
    prepared.words[prepared.starts[2]] = 1 << 41
    assert prepared.call() == 0
    values = [np.int32(9), np.array((1, 22, 3, 4, 5), PAGED_KV), np.uint64(1 << 41)]
    assert calls[0].parameters == [np.int32(9).tobytes(), kv.tobytes(), np.uint64(1 << 40).tobytes()]
    assert calls[1].parameters == [value.tobytes() for value in values]
    assert vars(calls[0]) | {"parameters": None} == vars(calls[1]) | {"parameters": None}


def test_a_call_leaves_prepared_launches_and_other_threads_alone(driver):
    calls, sizes = driver
    sizes += [4, 8]
    kernel = KernelLauncher(raw_kernel(1), overlaps=False)
    first, second = (kernel.prepare((i,), (32,), (np.int32(i), NULL)) for i in (1, 2))
    kernel((3,), (32,), (np.int32(3), SimpleNamespace(data=SimpleNamespace(ptr=4))))
    kernel((4,), (32,), (np.int32(4), NULL))
    thread = threading.Thread(target=kernel, args=((5,), (32,), (np.int32(5), NULL)))
    thread.start()
    thread.join()
    first.call()
    second.call()
    order = [3, 4, 5, 1, 2]
    assert [call.grid[0] for call in calls] == order
    assert [call.parameters for call in calls] == [
        [np.int32(i).tobytes(), np.uint64(4 if i == 3 else 0).tobytes()] for i in order
    ]


def test_a_launch_that_the_driver_refuses_is_an_error(driver, monkeypatch):
    import cupy

    class CUDADriverError(RuntimeError):
        pass

    monkeypatch.setattr(cupy.cuda.driver, "CUDADriverError", CUDADriverError)
    monkeypatch.setattr(launch, "driver", lambda: SimpleNamespace(cuLaunchKernelEx=lambda *_: 701))
    with pytest.raises(CUDADriverError, match="701"):
        KernelLauncher(raw_kernel(1), overlaps=True)((1,), (32,), ())


def test_what_overlaps_waits_and_only_hoppers_tier_overlaps(monkeypatch):
    waiting = {path.name for path in SOURCE_DIR.glob("*.cu") if overlaps(path)}
    assert {"embedding.cu", "rms_norm.cu", "linear_small.cu", "rope.cu", "paged_decode.cu"} <= waiting
    assert not waiting & {"logits.cu", "copy_blocks.cu"}

    cupy = pytest.importorskip("cupy")
    module = SimpleNamespace(get_function=lambda symbol: raw_kernel(1))
    monkeypatch.setattr(cupy, "RawModule", lambda path: module)
    set_device_info(DeviceInfo("sm_90a", num_sms=132, max_shared_bytes=232448))
    try:
        for tier, file, expected in (
            ("sm90", "rms_norm.cu", True),
            ("sm90", "logits.cu", False),
            ("portable", "rms_norm.cu", False),
        ):
            monkeypatch.setenv("CUPAGED_TIER", tier)
            assert compiler._open_image(file, SOURCE_DIR, "symbol").overlaps is expected
    finally:
        set_device_info(None)
