"""How loaded kernels are launched, so that Hopper's may overlap with the kernel before them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAX_DEFAULT_SHARED_BYTES = 48 << 10  # dynamic shared memory that a launch gets without asking


@functools.cache
def overlaps(source: Path) -> bool:
    """Whether the kernels of a .cu file may be launched before the kernel before them has ended: they wait for it."""
    return "griddepcontrol_wait()" in source.read_text()


class PreparedLaunch(NamedTuple):
    """A launch but for the call.

    words: the arguments' values, eight bytes each (memoryview of uint64), which may be changed between calls, and must
    live as long as those. starts: in which word each argument begins. call: launches, on the stream that was current;
    returns CUDA's status.
    """

    words: memoryview
    starts: list[int]
    call: Callable[[], int]


class KernelLauncher:
    """Launches a cupy.RawKernel through the driver's cuLaunchKernelEx, as CuPy's own launches have no attributes.

    overlaps: launches may begin while the kernel before them on the stream ends ("programmatic dependent launch" in the
    CUDA C++ Programming Guide); the kernel waits itself, see griddepcontrol_wait in ptx.cuh. Capturing a stream keeps
    what it says.
    """

    def __init__(self, raw_kernel, *, overlaps: bool):
        self.overlaps = overlaps
        self._raw_kernel = raw_kernel
        # By function: each device has its own. Asking for the current one's loads the cubin now and not at the first
        # launch, which may be within the capture of a graph.
        self._max_shared_bytes = {raw_kernel.kernel: MAX_DEFAULT_SHARED_BYTES}

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared_mem: int = 0) -> None:
        prepared = self.prepare(grid, block, args, shared_mem)  # which keeps the words that call reads
        check_status(prepared.call())

    def prepare(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared_mem: int = 0
    ) -> PreparedLaunch:
        """What calling the kernel with these would do, to be done later, perhaps several times."""
        import cupy

        function = self._raw_kernel.kernel  # the current device's
        if shared_mem > MAX_DEFAULT_SHARED_BYTES:
            self._allow_shared_memory(function, shared_mem)
        values, starts = bytearray(), []
        for arg in args:
            starts.append(len(values) >> 3)
            if isinstance(arg, _BY_VALUE):
                values += arg.tobytes()
                values += bytes(-len(values) & 7)
            else:
                values += arg.data.ptr.to_bytes(8, "little")
        address = ctypes.addressof(ctypes.c_char.from_buffer(values)) if args else 0
        config = _LaunchConfig(
            *grid, *_ONES[len(grid)], *block, *_ONES[len(block)], shared_mem, cupy.cuda.get_current_stream().ptr
        )
        if self.overlaps:
            config.attributes, config.num_attributes = _OVERLAPPING, 1
        parameters = (ctypes.c_void_p * len(args))(*[address + 8 * start for start in starts])
        call = functools.partial(
            driver().cuLaunchKernelEx, ctypes.byref(config), ctypes.c_void_p(function.ptr), parameters, None
        )
        return PreparedLaunch(memoryview(values).cast("Q"), starts, call)

    def _allow_shared_memory(self, function, shared_mem: int) -> None:
        if shared_mem > self._max_shared_bytes.get(function, MAX_DEFAULT_SHARED_BYTES):
            self._raw_kernel.max_dynamic_shared_size_bytes = shared_mem
            self._max_shared_bytes[function] = shared_mem


def check_status(status: int) -> None:
    """Raise cupy.cuda.driver.CUDADriverError for what PreparedLaunch.call returns, unless that is success."""
    if status != 0:
        import cupy

        raise cupy.cuda.driver.CUDADriverError(status)


_BY_VALUE = (np.generic, np.ndarray)
_ONES = ((1, 1, 1), (1, 1), (1,), ())  # what makes one size of three
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _LaunchAttribute(ctypes.Structure):  # CUlaunchAttribute; its value is a union of 64 bytes
    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class _LaunchConfig(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        *((f"grid_{axis}", ctypes.c_uint) for axis in "xyz"),
        *((f"block_{axis}", ctypes.c_uint) for axis in "xyz"),
        ("shared_mem", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


_OVERLAPPING = ctypes.pointer(_LaunchAttribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1))


@functools.cache
def driver() -> ctypes.CDLL:
    """The CUDA driver's library."""
    return ctypes.CDLL("libcuda.so.1")
