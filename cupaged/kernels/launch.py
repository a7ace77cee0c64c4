"""How loaded kernels are launched, so that Hopper's may overlap with the kernel before them."""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from pathlib import Path

import numpy as np

MAX_DEFAULT_SHARED_BYTES = 48 << 10  # dynamic shared memory that a launch gets without asking


@functools.cache
def overlaps(source: Path) -> bool:
    """Whether the kernels of a .cu file may be launched before the kernel before them has ended: they wait for it."""
    return "griddepcontrol_wait()" in source.read_text()


class PreparedLaunch:
    """A launch but for the call.

    words: the arguments' values, eight bytes each (memoryview of uint64), which may be changed between calls. starts:
    in which word each argument begins. call: launches, on the stream that was current; returns CUDA's status. What it
    reads lives as long as this object.
    """

    __slots__ = ("_memory", "_pack", "call", "starts", "words")

    def __init__(self, function, args: tuple):
        """For a cupy.cuda.Function, and arguments of these sizes; `fill` gives what it is called with."""
        formats, self.starts, end = [_CONFIG], [], 0
        for arg in args:
            size = arg.nbytes if isinstance(arg, _BY_VALUE) else 0
            formats.append(f"{size}s{-size % 8}x" if size else "Q")
            self.starts.append(end)
            end += -(-size // 8) or 1
        begin, end = _CONFIG_BYTES, _CONFIG_BYTES + 8 * end
        self._memory = bytearray(end + 8 * len(args))  # the configuration, the arguments, and where each of these is
        self._pack = struct.Struct("".join(formats)).pack_into
        self.words = memoryview(self._memory)[begin:end].cast("Q")
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        places = [address + begin + 8 * start for start in self.starts]
        struct.pack_into(f"{len(args)}Q", self._memory, end, *places)
        pointers = [ctypes.c_void_p(pointer) for pointer in (address, function.ptr, address + end)]
        self.call = functools.partial(driver().cuLaunchKernelEx, *pointers, None)

    def fill(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared_mem: int, stream: int, attributes: int
    ) -> None:
        """attributes: the address of one CUlaunchAttribute, or 0."""
        values = [arg.tobytes() if isinstance(arg, _BY_VALUE) else arg.data.ptr for arg in args]
        self._pack(
            self._memory, 0, *grid, *_ONES[len(grid)], *block, *_ONES[len(block)], shared_mem, stream, attributes,
            attributes != 0, *values,
        )  # fmt: skip


class _ThreadsOwn(threading.local):
    def __init__(self):
        self.launches: dict[tuple, PreparedLaunch] = {}


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
        self._own = _ThreadsOwn()  # memory for the next call, by function and kinds of arguments

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared_mem: int = 0) -> None:
        key = (self._raw_kernel.kernel, *map(type, args))
        if (launch := self._own.launches.get(key)) is None:
            launch = self._own.launches[key] = PreparedLaunch(key[0], args)
        self._fill(launch, key[0], grid, block, args, shared_mem)
        if status := launch.call():
            check_status(status)

    def prepare(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared_mem: int = 0
    ) -> PreparedLaunch:
        """What calling the kernel with these would do, to be done later, perhaps several times."""
        function = self._raw_kernel.kernel  # the current device's
        launch = PreparedLaunch(function, args)
        self._fill(launch, function, grid, block, args, shared_mem)
        return launch

    def _fill(self, launch: PreparedLaunch, function, grid, block, args, shared_mem) -> None:
        import cupy

        if shared_mem > self._max_shared_bytes.get(function, MAX_DEFAULT_SHARED_BYTES):
            self._raw_kernel.max_dynamic_shared_size_bytes = shared_mem
            self._max_shared_bytes[function] = shared_mem
        stream = cupy.cuda.get_current_stream().ptr
        launch.fill(grid, block, args, shared_mem, stream, _OVERLAPPING_ADDRESS if self.overlaps else 0)


def check_status(status: int) -> None:
    """Raise cupy.cuda.driver.CUDADriverError for what PreparedLaunch.call returns, unless that is success."""
    if status != 0:
        import cupy

        raise cupy.cuda.driver.CUDADriverError(status)


class _LaunchAttribute(ctypes.Structure):  # CUlaunchAttribute; its value is a union of 64 bytes
    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


_BY_VALUE = (np.generic, np.ndarray)
_ONES = ((1, 1, 1), (1, 1), (1,), ())  # what makes one size of three
# CUlaunchConfig: grid, block, shared memory; stream; attributes, and how many.
_CONFIG = "7I4xQQI4x"
_CONFIG_BYTES = struct.calcsize(_CONFIG)
# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, allowed
_OVERLAPPING = _LaunchAttribute(id=6, value=1)
_OVERLAPPING_ADDRESS = ctypes.addressof(_OVERLAPPING)


@functools.cache
def driver() -> ctypes.CDLL:
    """The CUDA driver's library."""
    return ctypes.CDLL("libcuda.so.1")
