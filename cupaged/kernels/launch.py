"""How loaded kernels are launched: through CuPy, or so that they overlap with the kernel before them."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np

MAX_DEFAULT_SHARED_BYTES = 48 << 10  # dynamic shared memory that a launch gets without asking


class RawKernelLauncher:
    """A cupy.RawKernel whose limit of dynamic shared memory follows what launches ask for."""

    def __init__(self, raw_kernel):
        self._raw_kernel = raw_kernel
        # By function: each device has its own. Asking for the current one's loads the cubin now and not at the first
        # launch, which may be within the capture of a graph.
        self._max_shared_bytes = {raw_kernel.kernel: MAX_DEFAULT_SHARED_BYTES}

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared_mem: int = 0) -> None:
        if shared_mem > MAX_DEFAULT_SHARED_BYTES:
            function = self._raw_kernel.kernel  # the current device's
            if shared_mem > self._max_shared_bytes.get(function, MAX_DEFAULT_SHARED_BYTES):
                self._raw_kernel.max_dynamic_shared_size_bytes = shared_mem
                self._max_shared_bytes[function] = shared_mem
        self._launch(grid, block, args, shared_mem)

    def _launch(self, grid, block, args, shared_mem) -> None:
        self._raw_kernel(grid, block, args, shared_mem=shared_mem)


@functools.cache
def overlaps(source: Path) -> bool:
    """Whether the kernels of a .cu file may be launched before the kernel before them has ended: they wait for it."""
    return "griddepcontrol_wait()" in source.read_text()


class OverlappingLauncher(RawKernelLauncher):
    """Launches that may begin while the kernel before them on the stream ends: "programmatic dependent launch" in the
    CUDA C++ Programming Guide. Capturing a stream keeps what it says.

    The kernel waits itself, see griddepcontrol_wait in ptx.cuh. CuPy's launches have no attributes, so that the
    driver's cuLaunchKernelEx is called.
    """

    def _launch(self, grid, block, args, shared_mem) -> None:
        import cupy

        values = [np.array(arg if isinstance(arg, np.generic | np.ndarray) else arg.data.ptr) for arg in args]
        attribute = _LaunchAttribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        config = _LaunchConfig(
            (ctypes.c_uint * 3)(*grid, *(1,) * (3 - len(grid))),
            (ctypes.c_uint * 3)(*block, *(1,) * (3 - len(block))),
            shared_mem,
            cupy.cuda.get_current_stream().ptr,
            ctypes.pointer(attribute),
            1,
        )
        parameters = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        function = ctypes.c_void_p(self._raw_kernel.kernel.ptr)
        status = driver().cuLaunchKernelEx(ctypes.byref(config), function, parameters, None)
        if status != 0:
            raise cupy.cuda.driver.CUDADriverError(status)


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
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_mem", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


@functools.cache
def driver() -> ctypes.CDLL:
    """The CUDA driver's library."""
    return ctypes.CDLL("libcuda.so.1")
