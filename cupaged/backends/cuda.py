"""The operations as launches of our kernels on an NVIDIA GPU. CuPy lends memory, copies and launches, no arithmetic."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupaged.backends.base import Array, Rope
from cupaged.backends.host_copy import HostCopier
from cupaged.config import BLOCK_SIZES, ModelConfig
from cupaged.engine.batch import Batch
from cupaged.errors import DeviceError, OutOfMemoryError
from cupaged.kernels import registry
from cupaged.kernels.checks import C_TYPE, HALF_TYPES, ceil_div, check, check_that
from cupaged.kernels.compile import compile_kernels, load_kernels, noted_launches
from cupaged.kernels.copy_blocks import copy_blocks
from cupaged.kernels.copy_words import WORD_BYTES, copy_words
from cupaged.kernels.device import device_info
from cupaged.kernels.embedding import embedding
from cupaged.kernels.layers import Layers
from cupaged.kernels.linear import linear, linear_silu_and_mul, linear_workspace_size
from cupaged.kernels.linear_few_sm90 import linear_few_sm90, linear_few_sm90_silu_and_mul
from cupaged.kernels.linear_sm90 import linear_sm90, linear_sm90_silu_and_mul
from cupaged.kernels.linear_small import (
    MAX_NORMED_COLUMNS,
    MAX_NORMED_ROWS,
    MAX_ROWS,
    linear_small,
    linear_small_silu_and_mul,
    rms_norm_linear_small,
    rms_norm_linear_small_silu_and_mul,
)
from cupaged.kernels.logits import edit_logits, keep_allowed
from cupaged.kernels.logprobs import logprobs
from cupaged.kernels.paged_decode import KERNELS as DECODE
from cupaged.kernels.paged_decode import decode_workspace_size, paged_decode
from cupaged.kernels.paged_decode_sm90 import KERNELS_SM90 as DECODE_SM90
from cupaged.kernels.paged_decode_sm90 import KEY_TILES as DECODE_HEAD_DIMS_SM90
from cupaged.kernels.paged_prefill import KERNELS as PREFILL
from cupaged.kernels.paged_prefill import paged_prefill, prefill_workspace_size
from cupaged.kernels.paged_prefill_sm90 import KERNELS_SM90 as PREFILL_SM90
from cupaged.kernels.rms_norm import rms_norm
from cupaged.kernels.rope import rope_and_store_kv
from cupaged.kernels.row_slices import row_workspace_size
from cupaged.kernels.sampler import sample
from cupaged.kernels.take_tokens import take_tokens
from cupaged.kernels.tier import SM90_SUFFIX, use_sm90
from cupaged.kernels.tuning import linear_few_is_quickest
from cupaged.memory.arena import KVArena
from cupaged.memory.budget import format_bytes

STAGING_BYTES = 32 << 20  # of each pinned buffer: one fills while the other is copied
# Copies that are no larger have buffers of their own. They come between the launches of steps, and the device reads one
# when it has done the steps before: with as many of them it doesn't keep the host waiting.
SMALL_BYTES = 64 << 10
NUM_SMALL = 32
MAX_COPIED_BYTES = 64 << 10  # by a kernel: more of them are the copy engine's
MIN_FETCH_BYTES = 4096  # of a pinned buffer for what comes back
PART_ALIGNMENT = 16  # bytes; where the arrays of a batch begin in their common buffer, for vector loads

BATCH_ARRAYS = [field.name for field in dataclasses.fields(Batch) if field.type == "Array"]
BENCHMARK_KERNELS = ("partial_sums.cu",)  # no model asks for them
# Their second template argument is head_dim.
CACHE_KERNELS = ("rope.cu", "paged_decode.cu", "paged_decode_sm90.cu", "paged_prefill.cu", "paged_prefill_sm90.cu")


# CUDA's own numbers, which CuPy doesn't name.
ERROR_OUT_OF_MEMORY = 2
ERROR_INSUFFICIENT_DRIVER = 35  # also when there is no driver at all
ERROR_NO_DEVICE = 100


DRIVER_LIBRARY = "libcuda.so.1"
NO_DRIVER = "no NVIDIA driver is installed"


class Probe(NamedTuple):
    """What `probe` found."""

    usable: bool
    text: str  # the GPU's name and driver, or in a line why there is none


def probe() -> Probe:
    """Whether the current CUDA device can run the kernels. Prints nothing, raises nothing, takes no device memory
    beyond the CUDA context."""
    if not _driver_is_there():
        return Probe(False, NO_DRIVER)  # without the time that it takes to import CuPy
    try:
        with warnings.catch_warnings(), _driver_starts_meanwhile():
            warnings.simplefilter("ignore")  # CuPy's remarks on CUDA libraries that nothing here needs
            import cupy
    except ImportError as error:
        return Probe(False, f"CuPy can't be imported ({str(error).strip().splitlines()[0]}); pip install cupy-cuda12x")
    runtime = cupy.cuda.runtime
    try:
        if runtime.getDeviceCount() == 0:
            return Probe(False, _no_device())
        device_info()  # asks for the compute capability
        runtime.memGetInfo()  # makes the CUDA context: a device that is broken or kept by another process refuses
        return Probe(True, CupyDevice().description)
    except DeviceError as error:
        return Probe(False, str(error))
    except runtime.CUDARuntimeError as error:
        if error.status == ERROR_INSUFFICIENT_DRIVER:
            return Probe(False, _insufficient_driver(runtime.driverGetVersion()))
        if error.status == ERROR_NO_DEVICE:
            return Probe(False, _no_device())
        return Probe(False, f"CUDA does not start: {error}")
    except (ImportError, OSError, RuntimeError) as error:
        return Probe(False, f"CUDA does not start: {str(error).strip().splitlines()[0]}")


def _driver_is_there() -> bool:
    try:
        ctypes.CDLL(DRIVER_LIBRARY)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _driver_starts_meanwhile() -> Iterator[None]:
    """While this lasts, a thread opens the driver and makes the first device's context: 0.2 s, in which Python can
    import CuPy. What goes wrong goes wrong again in CuPy's first call, which has the words for it."""

    def start() -> None:
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(DRIVER_LIBRARY)
            if library.cuInit(0) == 0:
                library.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), 0)

    if "cupy" in sys.modules:  # whose current device may be another one
        yield
        return
    thread = threading.Thread(target=start)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _insufficient_driver(version: int) -> str:
    if version == 0:
        return NO_DRIVER
    return (
        f"the NVIDIA driver is too old: it serves CUDA {_cuda_version(version)}, cupaged needs 12 (driver 525 or newer)"
    )


def _no_device() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "no NVIDIA GPU was found" + ("" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})")


def _cuda_version(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def open_cuda(dtype) -> CudaBackend:
    """The backend on the current CUDA device, with activations and KV cache in `dtype`, bfloat16 or float16.

    Raises DeviceError that says why when there is no usable GPU, ValueError on another dtype."""
    found = probe()
    if not found.usable:
        raise DeviceError(f"device 'cuda' can't be used: {found.text}")
    return CudaBackend(CupyDevice(), dtype)


class LinearKernels(NamedTuple):
    """What computes Backend.linear and Backend.linear_silu_and_mul."""

    linear: Callable[..., None]
    silu_and_mul: Callable[..., None]


SMALL = LinearKernels(linear_small, linear_small_silu_and_mul)
FEW_SM90 = LinearKernels(linear_few_sm90, linear_few_sm90_silu_and_mul)
SM90 = LinearKernels(linear_sm90, linear_sm90_silu_and_mul)


class CupyDevice:
    """All that the backend wants of CuPy: memory from its current allocator, copies on its current stream.

    has_kernels: whether kernels are loaded, so that small copies may be launches."""

    has_kernels = False

    def __init__(self):
        import cupy

        self._cupy = cupy
        runtime = cupy.cuda.runtime
        name = runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
        self.description = f"{name} (driver for CUDA {_cuda_version(runtime.driverGetVersion())})"

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """An uninitialised array. Raises MemoryError."""
        with self._memory_errors():
            return self._cupy.empty(shape, dtype)

    def pinned(self, num_bytes: int) -> np.ndarray:
        """Page-locked host memory [num_bytes] uint8, from which copies run by themselves and which kernels can address.

        Not from CuPy's pool, which rounds up to powers of two and keeps what it has. Raises MemoryError.
        """
        with self._memory_errors():
            memory = self._cupy.cuda.PinnedMemory(num_bytes)
        return np.frombuffer(self._cupy.cuda.PinnedMemoryPointer(memory, 0), np.uint8, num_bytes)

    @contextlib.contextmanager
    def _memory_errors(self) -> Iterator[None]:
        """What CuPy's pools raise is a MemoryError; allocators without a pool let CUDA's own error through."""
        try:
            yield
        except self._cupy.cuda.runtime.CUDARuntimeError as error:
            if error.status == ERROR_OUT_OF_MEMORY:
                raise MemoryError from None
            raise

    def copy(self, dst: Array, src: Array) -> None:
        """Start copying src to dst, both C-contiguous and of as many bytes."""
        runtime = self._cupy.cuda.runtime
        stream = self._cupy.cuda.get_current_stream()
        runtime.memcpyAsync(dst.data.ptr, src.data.ptr, src.nbytes, runtime.memcpyDeviceToDevice, stream.ptr)

    def start_copy(self, dst: Array, src: np.ndarray) -> Callable[[], None]:
        """Start copying pinned bytes to dst (C-contiguous, as many bytes); returns what waits until they are read."""
        return self._start(dst.data.ptr, src.ctypes.data, src.nbytes, self._cupy.cuda.runtime.memcpyHostToDevice)

    def start_fetch(self, dst: np.ndarray, src: Array) -> Callable[[], None]:
        """Start copying src (C-contiguous, as many bytes) to pinned bytes; returns what waits until they are there."""
        return self._start(dst.ctypes.data, src.data.ptr, src.nbytes, self._cupy.cuda.runtime.memcpyDeviceToHost)

    def _start(self, dst: int, src: int, num_bytes: int, kind: int) -> Callable[[], None]:
        stream = self._cupy.cuda.get_current_stream()
        if self.has_kernels and num_bytes <= MAX_COPIED_BYTES and num_bytes % WORD_BYTES == 0:
            copy_words(dst, src, num_bytes)
        else:
            self._cupy.cuda.runtime.memcpyAsync(dst, src, num_bytes, kind, stream.ptr)
        return stream.record(self._cupy.cuda.Event(disable_timing=True)).synchronize

    def capture(self, function: Callable[[], object]) -> Callable[[], None]:
        """Record what function launches, without running it; returns what launches it all on the current stream."""
        # On a stream of our own: CUDA's default stream can't be captured. Nothing runs there, so nothing has to wait.
        stream = self._cupy.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            try:
                function()
            finally:
                graph = stream.end_capture()
        return graph.launch

    def to_host(self, src: Array) -> np.ndarray:
        return self._cupy.asnumpy(src)

    def address(self, array: Array) -> int:
        return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr

    def memory_info(self) -> tuple[int, int]:
        """(free, total) bytes. What CuPy's pool holds unused counts as free; the pool's limit bounds both."""
        free, total = self._cupy.cuda.runtime.memGetInfo()
        pool = getattr(self._cupy.cuda.get_allocator(), "__self__", None)  # None: the host program's own allocator
        if isinstance(pool, self._cupy.cuda.MemoryPool):
            free += pool.free_bytes()
            if limit := pool.get_limit():
                free, total = min(free, limit - pool.used_bytes()), min(total, limit)
        return free, total


class PinnedRing:
    """Copies to the device through pinned buffers in turn: while those are copied that were filled before, the next is
    filled."""

    def __init__(self, device, num_bytes: int, num_buffers: int = 2):
        self.num_bytes = num_bytes
        self._device = device
        memory = device.pinned(num_bytes * num_buffers)
        self._buffers = [memory[i * num_bytes : (i + 1) * num_bytes] for i in range(num_buffers)]
        self._wait_until_read: list[Callable[[], None]] = [lambda: None] * num_buffers
        self._turn = 0

    def wait(self) -> None:
        """Return when no copy out of the buffers is under way."""
        for wait_until_read in self._wait_until_read:
            wait_until_read()

    def copy(self, dst: Array, fill: Callable[[np.ndarray], None]) -> None:
        """Start copying to dst (C-contiguous, at most num_bytes) what `fill` writes into the uint8 array it gets."""
        turn = self._turn = (self._turn + 1) % len(self._buffers)
        self._wait_until_read[turn]()
        staged = self._buffers[turn][: dst.nbytes]
        fill(staged)
        self._wait_until_read[turn] = self._device.start_copy(dst, staged)


class PinnedPool:
    """Copies from the device into pinned buffers, as many as are under way at a time; each serves again once its copy
    was taken out."""

    def __init__(self, device):
        self._device = device
        self._buffers: list[np.ndarray] = []  # all: one whose copy nobody waits for must not be given back
        self._free: list[np.ndarray] = []

    def fetch(self, src: Array) -> Callable[[], np.ndarray]:
        """`Backend.fetch`."""
        buffer = self._take(src.nbytes)
        staged = buffer[: src.nbytes].view(src.dtype).reshape(src.shape)
        wait = self._device.start_fetch(staged, src)

        def take_out() -> np.ndarray:
            wait()
            array = staged.copy()
            self._free.append(buffer)
            return array

        return take_out

    def _take(self, num_bytes: int) -> np.ndarray:
        for i, buffer in enumerate(self._free):
            if buffer.nbytes >= num_bytes:
                return self._free.pop(i)
        self._buffers.append(self._device.pinned(max(MIN_FETCH_BYTES, 1 << (num_bytes - 1).bit_length())))
        return self._buffers[-1]


class BatchPlaces(NamedTuple):
    """Where the arrays of a batch lie, by their shapes alone."""

    views: dict[str, Array]  # by name, on the device
    buffer: Array  # uint8: all of them
    words: list[slice]  # of int32, of each, in the buffer


class CudaBackend:
    """Backend over cupy.ndarray; see cupaged.backends.base for what each operation computes.

    device: a CupyDevice; the tests pass one over NumPy. dtype: bfloat16 or float16.

    Copies and launches go to CuPy's current device and stream. All calls want the same ones to be current: the order of
    one stream is what keeps an array from being overwritten before a kernel has read it.
    """

    name = "cuda"
    has_graphs = True

    def __init__(self, device, dtype):
        self.dtype = np.dtype(dtype)
        if self.dtype not in HALF_TYPES:
            raise ValueError(f"dtype: device 'cuda' computes in bfloat16 or float16; got {self.dtype}")
        self.description = device.description
        self._device = device
        self._staging: PinnedRing | None = None  # page-locking takes 0.5 ms a MB: with the first large copy
        self._small_staging = PinnedRing(device, SMALL_BYTES, NUM_SMALL)
        self._copier = HostCopier()
        self._fetches = PinnedPool(device)
        self._batch_staging: PinnedRing | None = None
        self._batch_buffer: Array | None = None  # uint8: all arrays of a batch
        self._batch_places: Callable[..., BatchPlaces] | None = None
        self._decode_workspace: Array | None = None  # uint8: the partial results of split sequences
        self._prefill_workspace: Array | None = None  # uint8: the same, of prompts
        self._linear_workspace: Array | None = None  # uint8: the partial sums of split matrix products
        self._rows_workspace: Array | None = None  # uint8: what parts of rows of logits find
        self._layers: Layers | None = None  # whose addresses are known
        self._sm90 = False  # whether Hopper's own kernels take the portable ones' place

    # -- memory --------------------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype) -> Array:
        dtype = np.dtype(dtype)
        try:
            return self._device.empty(shape, dtype)
        except MemoryError:  # CuPy's own is one of them
            wanted, (free, total) = math.prod(shape) * dtype.itemsize, self.memory_info()
        raise OutOfMemoryError(
            f"the GPU has too little memory: {format_bytes(wanted)} wanted for an array {tuple(shape)} {dtype}, "
            f"{format_bytes(free)} of {format_bytes(total)} free; lower kv_cache_memory_bytes, "
            "max_num_batched_tokens or max_model_len, or take a smaller model"
        )

    def empty_host(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        dtype = np.dtype(dtype)
        num_bytes = math.prod(shape) * dtype.itemsize
        try:
            return self._device.pinned(num_bytes).view(dtype).reshape(shape)
        except MemoryError:
            raise OutOfMemoryError(
                f"the host can't page-lock {format_bytes(num_bytes)} for an array {tuple(shape)} {dtype}: make the "
                "swap space smaller"
            ) from None

    def copy_in(self, dst: Array, src: np.ndarray) -> None:
        if dst.shape != src.shape or not dst.flags.c_contiguous:
            layout = "" if dst.flags.c_contiguous else ", not C-contiguous"
            raise ValueError(f"dst: expected shape {src.shape}, C-contiguous; got {dst.shape}{layout}")
        if dst.nbytes <= self._small_staging.num_bytes:
            if dst.nbytes:
                self._small_staging.copy(
                    dst, lambda staged: np.copyto(staged.view(dst.dtype).reshape(dst.shape), src, casting="unsafe")
                )
            return
        if self._staging is None:
            self._staging = PinnedRing(self._device, STAGING_BYTES)
        dst, src = dst.reshape(-1), src.reshape(-1)
        step = self._staging.num_bytes // dst.dtype.itemsize
        for start in range(0, dst.size, step):
            part = src[start : start + step]
            self._staging.copy(
                dst[start : start + step],
                lambda staged, part=part: self._copier.copy(staged.view(dst.dtype), part),
            )

    def copy(self, dst: Array, src: Array) -> None:
        check("dst", dst, src.shape, src.dtype)
        check("src", src, src.shape, src.dtype)
        self._device.copy(dst, src)

    def to_host(self, src: Array) -> np.ndarray:
        return self._device.to_host(src)

    def fetch(self, src: Array) -> Callable[[], np.ndarray]:
        return self._fetches.fetch(src)

    def address(self, array: Array) -> int:
        return self._device.address(array)

    def memory_info(self) -> tuple[int, int]:
        return self._device.memory_info()

    def compile(self, config: ModelConfig) -> None:
        compile_kernels(list(needed_kernels(self.dtype, config.head_dim, use_sm90())), device_info().arch)

    def reserve(self, config: ModelConfig, max_num_tokens: int, max_num_seqs: int, max_model_len: int) -> None:
        self._sm90 = use_sm90()
        load_kernels(needed_kernels(self.dtype, config.head_dim, self._sm90))
        self._device.has_kernels = True

        num_bytes = decode_workspace_size(
            max_num_seqs, config.num_heads, config.num_kv_heads, config.head_dim, max_model_len
        )
        self._decode_workspace = self._zeros(_padded(num_bytes))
        num_bytes = prefill_workspace_size(self.dtype, config.head_dim, config.num_kv_heads, max_model_len)
        self._prefill_workspace = self._zeros(num_bytes)
        self._linear_workspace = self._zeros(linear_workspace_size(device_info()))
        self._rows_workspace = self._zeros(row_workspace_size(max_num_seqs, config.vocab_size))

        max_blocks = ceil_div(max_model_len, min(BLOCK_SIZES))  # the arena's block size isn't known yet
        by_token, by_sequence = 3 * [max_num_tokens], [max_num_seqs + 1, max_num_seqs, max_num_seqs]
        num_bytes = sum(_padded(4 * count) for count in (*by_token, *by_sequence, max_num_seqs * max_blocks))
        self._batch_buffer = self.empty((num_bytes,), np.uint8)
        self._batch_places = functools.lru_cache(maxsize=256)(self._find_batch_places)  # views take CuPy microseconds
        self._batch_staging = PinnedRing(self._device, num_bytes)

    def _zeros(self, num_bytes: int) -> Array:
        zeros = self.empty((num_bytes,), np.uint8)
        self.copy_in(zeros, np.broadcast_to(np.uint8(0), zeros.shape))
        return zeros

    def upload_batch(self, batch: Batch) -> Batch:
        arrays = [getattr(batch, name) for name in BATCH_ARRAYS]
        places = self._batch_places(tuple([array.shape for array in arrays]))

        def fill(staged: np.ndarray) -> None:
            words = staged.view(np.int32)
            for array, words_of_it in zip(arrays, places.words, strict=True):
                words[words_of_it] = array.reshape(-1)

        self._batch_staging.copy(places.buffer, fill)
        return Batch(
            **places.views,
            num_decodes=batch.num_decodes,
            max_query_len=batch.max_query_len,
            max_seq_len=batch.max_seq_len,
        )

    def _find_batch_places(self, shapes: tuple[tuple[int, ...], ...]) -> BatchPlaces:
        views, words, end = {}, [], 0
        for name, shape in zip(BATCH_ARRAYS, shapes, strict=True):
            start, size = end, math.prod(shape)
            end += ceil_div(size * 4, PART_ALIGNMENT) * PART_ALIGNMENT // 4
            check_that(4 * end <= self._batch_buffer.nbytes, "batch: larger than what was reserved")
            views[name] = self._batch_buffer[4 * start : 4 * (start + size)].view(np.int32).reshape(shape)
            words.append(slice(start, start + size))
        return BatchPlaces(views, self._batch_buffer[: 4 * end], words)

    def capture(self, function: Callable[[], object]) -> Callable[[], None]:
        return self._device.capture(function)

    def close(self) -> None:
        for ring in (self._staging, self._small_staging, self._batch_staging):
            if ring is not None:
                ring.wait()
        self._copier.close()
        self._staging = self._small_staging = self._batch_staging = self._batch_buffer = self._fetches = None
        self._batch_places = None
        self._decode_workspace = self._prefill_workspace = self._linear_workspace = self._rows_workspace = None
        self._layers = None

    # -- the cache -----------------------------------------------------------------------------------------

    copy_blocks = staticmethod(copy_blocks)

    # -- the forward pass ----------------------------------------------------------------------------------

    def for_each_layer(self, layers: Sequence[Any], arena: KVArena, run: Callable[[int, Any], None]) -> None:
        if self._layers is None or self._layers.weights is not layers:
            self._layers = Layers(layers, self.address)
        with noted_launches() as launches:
            run(0, layers[0])
        if not self._layers.launch_others(launches, arena):
            for i in range(1, len(layers)):
                run(i, layers[i])

    take_tokens = staticmethod(take_tokens)
    embedding = staticmethod(embedding)
    rms_norm = staticmethod(rms_norm)
    rope_and_store_kv = staticmethod(rope_and_store_kv)

    def linear(
        self, out: Array, x: Array, weight: Array, bias: Array | None = None, *, accumulate: bool = False
    ) -> None:
        self._linear_kernels(x, weight).linear(out, x, weight, bias, accumulate=accumulate)

    def linear_silu_and_mul(self, out: Array, x: Array, weight: Array) -> None:
        self._linear_kernels(x, weight).silu_and_mul(out, x, weight)

    def rms_norm_linear(
        self, out: Array, x: Array, norm: Array, eps: float, normed: Array, weight: Array, bias: Array | None = None
    ) -> None:
        if self._norms_within(x, weight):
            rms_norm_linear_small(out, x, norm, eps, weight, bias)
        else:
            rms_norm(normed, x, norm, eps)
            self.linear(out, normed, weight, bias)

    def rms_norm_linear_silu_and_mul(
        self, out: Array, x: Array, norm: Array, eps: float, normed: Array, weight: Array
    ) -> None:
        if self._norms_within(x, weight):
            rms_norm_linear_small_silu_and_mul(out, x, norm, eps, weight)
        else:
            rms_norm(normed, x, norm, eps)
            self.linear_silu_and_mul(out, normed, weight)

    def _norms_within(self, x: Array, weight: Array) -> bool:
        """Whether the kernel for these products is to norm x itself."""
        num_rows, num_columns = x.shape
        is_small = num_rows <= MAX_NORMED_ROWS and num_columns <= MAX_NORMED_COLUMNS
        return is_small and self._linear_kernels(x, weight) is SMALL

    def _linear_kernels(self, x: Array, weight: Array) -> LinearKernels:
        """Kernels sum in orders of their own. Which one it is may change at 8 rows, at 16 and at 64, on Hopper also at
        128, 256 and 512, by the weight's shape; between these a row has the same results, bit for bit, whatever else is
        in the batch, on GPUs of one kind."""
        num_rows = x.shape[0]
        if self._sm90 and linear_few_is_quickest(num_rows, *weight.shape, device_info()):
            return FEW_SM90
        if num_rows <= MAX_ROWS:
            return SMALL
        if self._sm90:
            return SM90
        portable = linear, linear_silu_and_mul
        return LinearKernels(*(functools.partial(kernel, workspace=self._linear_workspace) for kernel in portable))

    def paged_attention(
        self,
        out: Array,
        qkv: Array,
        arena: KVArena,
        layer: int,
        batch: Batch,
        num_heads: int,
        sm_scale: float,
        window: int = 0,
    ) -> None:
        if batch.num_decodes:
            self._decode(out, qkv, arena, layer, batch, num_heads, sm_scale, window)
        if batch.num_decodes < batch.num_seqs:
            paged_prefill(
                out, qkv, arena, layer, batch.block_tables, batch.seq_lens, batch.query_start_loc,
                self._prefill_workspace, num_heads=num_heads, num_decodes=batch.num_decodes,
                max_query_len=batch.max_query_len, max_seq_len=batch.max_seq_len, sm_scale=sm_scale, window=window,
                kernels=PREFILL_SM90 if self._sm90 else PREFILL,
            )  # fmt: skip

    def rope_and_attend(
        self, out: Array, qkv: Array, arena: KVArena, layer: int, batch: Batch, num_heads: int, sm_scale: float,
        window: int, rope: Rope,
    ) -> None:  # fmt: skip
        attention = (out, qkv, arena, layer, batch, num_heads, sm_scale, window)
        if batch.num_decodes == batch.num_seqs and self._sm90 and arena.layout.head_dim in DECODE_HEAD_DIMS_SM90:
            self._decode(*attention, rope)
            return
        tokens = batch.positions, batch.slot_mapping
        rope_and_store_kv(qkv, arena, layer, *tokens, rope.cos_sin, num_heads, *rope[1:])
        self.paged_attention(*attention)

    def _decode(self, out, qkv, arena, layer, batch: Batch, num_heads, sm_scale, window, rope: Rope | None = None):
        paged_decode(
            out, qkv, arena, layer, batch.block_tables, batch.seq_lens, self._decode_workspace, num_heads=num_heads,
            num_decodes=batch.num_decodes, max_seq_len=batch.max_seq_len, sm_scale=sm_scale, window=window, rope=rope,
            kernels=DECODE_SM90 if self._sm90 else DECODE,
        )  # fmt: skip

    # -- sampling ------------------------------------------------------------------------------------------

    keep_allowed = staticmethod(keep_allowed)
    edit_logits = staticmethod(edit_logits)

    def sample(self, token_ids: Array, logits: Array, rows: Array, vocab_size: int, *, greedy: bool = False) -> None:
        sample(token_ids, logits, rows, vocab_size, self._rows_workspace, greedy=greedy)

    def logprobs(
        self, top_ids: Array, top_logprobs: Array, ranks: Array, logits: Array, token_ids: Array, vocab_size: int
    ) -> None:
        logprobs(top_ids, top_logprobs, ranks, logits, token_ids, vocab_size, self._rows_workspace)


def _padded(num_bytes: int) -> int:
    return ceil_div(num_bytes, PART_ALIGNMENT) * PART_ALIGNMENT


def needed_kernels(dtype: np.dtype, head_dim: int, sm90: bool) -> Iterator[tuple[str, str]]:
    """Of the instantiations that are shipped, those that a model with this dtype and head_dim may ask for, with or
    without Hopper's own."""
    other_types = {C_TYPE[other] for other in HALF_TYPES if other != dtype}
    for file, name in registry.instantiations():
        arguments = name[name.index("<") + 1 : -1].split(", ")
        other_cache = file in CACHE_KERNELS and arguments[1] != str(head_dim)
        other_tier = file.endswith(SM90_SUFFIX) and not sm90
        if file not in BENCHMARK_KERNELS and arguments[0] not in other_types and not other_cache and not other_tier:
            yield file, name
