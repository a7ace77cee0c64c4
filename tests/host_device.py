"""Devices for CudaBackend where there is no GPU: memory and copies of their own, kernels from the host build."""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from cupaged.kernels.device import DeviceInfo

H100 = DeviceInfo("sm_90a", num_sms=132, max_shared_bytes=232448)


@dataclass(frozen=True)
class Launch:
    name: str
    kernel: Callable
    grid: tuple[int, ...]
    block: tuple[int, ...]
    args: tuple
    shared_mem: int

    def run(self) -> None:
        self.kernel(self.grid, self.block, self.args, self.shared_mem)


def is_value(arg) -> bool:
    """Whether a kernel gets it by value: a number or a struct."""
    return isinstance(arg, np.generic) or (isinstance(arg, np.ndarray) and arg.ndim == 0)


class Graph:
    """Launches that were recorded; called, it runs them, on what their arrays hold then."""

    def __init__(self, device: NumpyDevice, launches: list[Launch]):
        self.launches = launches
        self.num_runs = 0
        self._device = device

    def __call__(self) -> None:
        self.num_runs += 1
        for launch in self.launches:
            self._device.later(launch.run)


class NumpyDevice:
    """CupyDevice over NumPy arrays, with memory that starts as NaN.

    Copies and kernels run as late as they may: when somebody waits for them or for a later one. So a buffer that is
    filled again or read too early shows.

    graphs: what `capture` has made, in order, as weak references.
    """

    description = "a stand-in"

    def __init__(self, runner):
        self._runner = runner
        self._put_off: deque[tuple[Callable[[], None], tuple]] = deque()
        self._num_run = 0
        self._recorded: list[Launch] | None = None  # while a graph is captured
        self.graphs: list[weakref.ref[Graph]] = []

    def empty(self, shape, dtype):
        self._refuse_in_capture("memory is taken")
        return self._runner.empty(shape, dtype)

    def pinned(self, num_bytes):
        self._refuse_in_capture("memory is taken")
        return self._runner.empty((num_bytes,), np.uint8)

    def as_numpy(self, array):
        """The array's memory as a NumPy array."""
        return array

    def start_copy(self, dst, src):
        self._refuse_in_capture("the host is copied from")
        on_device = self.as_numpy(dst).reshape(-1).view(np.uint8)
        return self.later(lambda: np.copyto(on_device, src))

    def start_fetch(self, dst, src):
        self._refuse_in_capture("the host is copied to")
        on_device = self.as_numpy(src)
        return self.later(lambda: np.copyto(dst, on_device))

    def copy(self, dst, src):
        self.launch(Launch("copy", lambda grid, block, args, shared_mem: np.copyto(*args), (), (), (dst, src), 0))

    def launch(self, launch):
        """Run it, or record it for a graph: with the arrays' places, not with what they hold."""
        arrays = launch.args
        launch = replace(launch, args=tuple(arg.copy() if is_value(arg) else self.as_numpy(arg) for arg in arrays))
        if self._recorded is not None:
            self._recorded.append(launch)
        else:
            self.later(launch.run, arrays)

    def capture(self, function):
        assert self._recorded is None
        self._recorded = []
        try:
            function()
        finally:
            graph, self._recorded = Graph(self, self._recorded), None
        self.graphs.append(weakref.ref(graph))
        return graph

    def _refuse_in_capture(self, what):
        assert self._recorded is None, f"{what} while a graph is captured"

    def later(self, run, arrays=()):
        """Put it off, and keep these arrays until then; returns what waits for it."""
        self._put_off.append((run, arrays))
        number = self._num_run + len(self._put_off)

        def wait():
            while self._num_run < number:
                self._num_run += 1
                run, _ = self._put_off.popleft()
                run()

        return wait

    def flush(self):
        self.later(lambda: None)()

    def to_host(self, src):
        self._refuse_in_capture("a result is waited for")
        self.flush()
        return self.as_numpy(src).copy()

    def address(self, array):
        return array.ctypes.data

    def memory_info(self):
        return 3_000_000_000, 4_000_000_000


class CupyArraysDevice(NumpyDevice):
    """CuPy's own arrays over the host's memory: without a GPU they can be sliced, reshaped, viewed and passed on. What
    a launcher or the backend asks of an array, CuPy must be able to answer."""

    def __init__(self, runner):
        super().__init__(runner)
        import cupy

        self._cupy = cupy

    def empty(self, shape, dtype):
        with self._cupy.cuda.using_allocator(self._allocate):
            return self._cupy.empty(shape, dtype)

    def _allocate(self, num_bytes):
        memory = self._runner.empty((num_bytes + 256,), np.uint8)
        start = -memory.ctypes.data % 256  # as a GPU's memory is aligned
        unowned = self._cupy.cuda.UnownedMemory(memory.ctypes.data, memory.nbytes, memory, 0)
        return self._cupy.cuda.MemoryPointer(unowned, start)

    def as_numpy(self, array):
        if not isinstance(array, self._cupy.ndarray):
            return array
        if array.size == 0:
            return np.empty(array.shape, array.dtype)
        assert array.flags.c_contiguous
        memory = (ctypes.c_uint8 * array.nbytes).from_address(array.data.ptr)
        return np.frombuffer(memory, np.uint8).view(array.dtype).reshape(array.shape)

    def address(self, array):
        return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
