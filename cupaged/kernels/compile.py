"""The only place that compiles and loads kernels.

    cuda_src/x.cu, "x<__half, 4>"  --NVRTC-->  cubin on disk  --cupy.RawModule(path=...)-->  Kernel

The cubin is one that was built ahead (prebuilt.py), one from an earlier process (kernel_cache.py), or made now.

NVRTC is called directly because RawModule, given source, adds an -arch of its own (plain sm_90, which has no wgmma)
and -ftz=true, and because CuPy's disk cache doesn't look into headers. Here an instantiation is compiled with exactly
one -arch, and its cache key covers all that the result depends on. All GPUs that a process uses are taken to be of one
architecture. Importing this module imports neither CuPy nor NVRTC.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

import cupaged.cuda_src
from cupaged.arguments import require
from cupaged.cache_dir import cache_dir
from cupaged.errors import CupagedError, DeviceError
from cupaged.kernels.device import compiled_archs, device_info
from cupaged.kernels.kernel_cache import KernelCache, KernelFolder
from cupaged.kernels.launch import KernelLauncher, overlaps
from cupaged.kernels.nvrtc import load_nvrtc
from cupaged.kernels.prebuilt import find_prebuilt
from cupaged.kernels.tier import runs_on, use_sm90

SOURCE_DIR = Path(cupaged.cuda_src.__file__).resolve().parent

# -lineinfo lets profilers and compute-sanitizer name source lines, at no cost when running. Float flags are NVRTC's
# defaults on purpose: subnormals are kept (a bfloat16 subnormal is a float32 subnormal, which -ftz=true would turn
# into 0), divisions and square roots round correctly. A kernel that wants the fast forms says so: __expf, __fdividef.
FLAGS = ("-std=c++17", "-lineinfo")

NULL = np.uint64(0)  # as a kernel's argument: a null pointer, for an array that is absent


class Kernel(Protocol):
    """A loaded kernel. Arguments are arrays or NULL, 0-d structured NumPy arrays (structs by value), or NumPy scalars
    of the parameter's exact type (np.int32, np.int64, np.float32)."""

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared_mem: int = 0) -> None: ...


class Launch(NamedTuple):
    """A call of a kernel."""

    kernel: Kernel
    grid: tuple[int, ...]
    block: tuple[int, ...]
    args: tuple
    shared_mem: int


class _Noted(threading.local):
    launches: list[Launch] | None = None  # of this thread, while they are noted


_noted = _Noted()


@contextmanager
def noted_launches() -> Iterator[list[Launch]]:
    """A list of all that this thread's launchers launch while this lasts. It grows as they do."""
    outer, _noted.launches = _noted.launches, []
    try:
        yield _noted.launches
    finally:
        _noted.launches = outer


def load_kernel(file: str, name: str) -> Kernel:
    """The instantiation `name` (a C++ expression such as "rms_norm<__half, 4>") of cuda_src/`file`."""
    kernel = _load(file, name)
    return kernel if _noted.launches is None else functools.partial(_note, kernel)


def _note(kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared_mem: int = 0) -> None:
    _noted.launches.append(Launch(kernel, grid, block, args, shared_mem))
    kernel(grid, block, args, shared_mem)


def set_loader(load: Callable[[str, str], Kernel]) -> None:
    """Replace the way that kernels are loaded: the tests run the same launchers over a build for the host."""
    global _load
    _load = load


def load_from_cubin(file: str, name: str) -> Kernel:
    """The default loader: compile for the current device unless the cache has it, and load through CuPy."""
    if (kernel := _loaded.get((file, name))) is None:
        kernel = _loaded[file, name] = _open_image(file, *compile_kernel(file, name, device_info().arch))
    return kernel


_load: Callable[[str, str], Kernel] = load_from_cubin
_loaded: dict[tuple[str, str], Kernel] = {}  # by load_from_cubin and load_kernels


def load_kernels(kernels: Iterable[tuple[str, str]]) -> None:
    """Load (file, name) pairs for the current device, compiling in parallel what the cache lacks: then no launch has
    to, which would cost the first steps time and break the capture of a graph."""
    missing = [pair for pair in kernels if pair not in _loaded]
    for pair, image in compile_kernels(missing, device_info().arch).items():
        _loaded[pair] = _open_image(pair[0], *image)


def _open_image(file: str, path: Path, symbol: str) -> Kernel:
    import cupy

    raw_kernel = cupy.RawModule(path=str(path)).get_function(symbol)
    return KernelLauncher(raw_kernel, overlaps=use_sm90() and overlaps(SOURCE_DIR / file))


def compile_kernel(file: str, name: str, arch: str) -> tuple[Path, str]:
    """The path of the compiled instantiation and its symbol: built ahead, from the cache, or compiled into it."""
    key, entry = _find_kernel(file, name, arch)
    if entry is not None:
        return entry
    image, symbols = compile_program(file, (name,), arch)
    return _kernel_cache().store(key, image, symbols[name])


def _find_kernel(file: str, name: str, arch: str) -> tuple[str, tuple[Path, str] | None]:
    """(key in the cache, what is there), or what was built ahead."""
    if (entry := find_prebuilt(kernel_key(file, name, arch), arch)) is not None:
        return "", entry
    try:
        key = cache_key(file, name, arch)
    except DeviceError as error:
        raise DeviceError(f"{file}: {name} was not built ahead for {arch}, and {error}") from None
    return key, _kernel_cache().find(key)


def compile_kernels(
    kernels: Sequence[tuple[str, str]], arch: str, num_threads: int | None = None
) -> dict[tuple[str, str], tuple[Path, str]]:
    """compile_kernel for each (file, name); what has to be compiled in parallel (by default one thread a processor)."""
    # Threads would only be in each other's way where there is nothing but digests to compute.
    images = {pair: _find_kernel(*pair, arch)[1] for pair in kernels}
    missing = [pair for pair, image in images.items() if image is None]
    if missing:
        with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
            images.update(zip(missing, pool.map(lambda pair: compile_kernel(*pair, arch), missing), strict=True))
    return images


def prebuild_kernels(
    kernels: Sequence[tuple[str, str]],
    archs: Sequence[str],
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Compile each (file, name) for each architecture that it is written for into a folder for `prebuilt`, in parallel,
    without a GPU. Returns how many images that makes.

    What is there already stays. progress: gets how many there are so far, and how many there will be. Raises ValueError
    for an architecture that NVRTC doesn't know, CupagedError when the folder can't be written or a kernel doesn't
    compile.
    """
    for arch in archs:
        require(arch in compiled_archs(), "arch", arch, f"one of {', '.join(compiled_archs())}")
    todo = [
        (KernelFolder(folder / arch), file, name, arch)
        for arch in archs
        for file, name in kernels
        if runs_on(file, arch)
    ]

    def build(target: KernelFolder, file: str, name: str, arch: str) -> None:
        key = kernel_key(file, name, arch)
        if target.find(key) is None:
            image, symbols = compile_program(file, (name,), arch)
            target.store(key, image, symbols[name])

    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # a folder that can't be written is found before minutes are spent
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for count, _ in enumerate(pool.map(lambda item: build(*item), todo), 1):
                if progress is not None:
                    progress(count, len(todo))
    except OSError as error:
        raise CupagedError(f"{folder}: can't be written: {error.strerror}") from None
    return len(todo)


def compile_program(file: str, names: Sequence[str], arch: str) -> tuple[bytes, dict[str, str]]:
    """Compile instantiations `names` of cuda_src/`file` into one image: a cubin, or PTX when arch is "compute_..".

    Returns the image and the mangled symbol of each name. Raises CupagedError with the first of NVRTC's errors.
    Threads compile in parallel: CuPy's binding releases the GIL (two threads on two cores: 1.6 to 1.75 times as fast).
    """
    nvrtc = load_nvrtc()
    path = SOURCE_DIR / file
    options = (f"-arch={arch}", *FLAGS, *(f"-I{folder}" for folder in _include_dirs()))
    program = nvrtc.createProgram(path.read_text(), str(path), (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program) or str(error)
            raise CupagedError(f"{file}: {', '.join(names)} for {arch}: {_first_errors(log)}") from None
        image = nvrtc.getPTX(program) if arch.startswith("compute_") else nvrtc.getCUBIN(program)
        return image, {name: nvrtc.getLoweredName(program, name) for name in names}
    finally:
        nvrtc.destroyProgram(program)


def _first_errors(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return "; ".join([line for line in lines if re.search(r"\berror\b", line)][:3] or lines[:3])


def kernel_key(file: str, name: str, arch: str) -> str:
    """A digest of what is compiled: our source and headers, the options, architecture and name."""
    digest = hashlib.sha256(repr((file, name, arch, FLAGS)).encode())
    digest.update(source_digest(SOURCE_DIR / file, (SOURCE_DIR,)))
    return digest.hexdigest()


def cache_key(file: str, name: str, arch: str) -> str:
    """A digest of all that the image depends on: kernel_key, and with what it is compiled: NVRTC, CUDA's headers."""
    digest = hashlib.sha256(repr((kernel_key(file, name, arch), load_nvrtc().getVersion())).encode())
    digest.update(source_digest(SOURCE_DIR / file, _include_dirs()))
    return digest.hexdigest()


@functools.cache
def source_digest(path: Path, include_dirs: tuple[Path, ...]) -> bytes:
    """A digest of the file and of every file that it includes and that is found in the folders, whatever #if is around
    the #include. Read once in a process: CUDA's headers take a while."""
    digests: dict[Path, bytes] = {}
    pending = [path]
    while pending:
        path = pending.pop()
        if path in digests:
            continue
        digests[path], included = _scan(path, include_dirs)
        pending += included
    return hashlib.sha256(b"".join(digests.values())).digest()  # in order of discovery, which the contents determine


@functools.cache
def _scan(path: Path, include_dirs: tuple[Path, ...]) -> tuple[bytes, list[Path]]:
    """A file's digest and what it includes, as far as that is found beside it and in the folders."""
    content = path.read_bytes()
    names = re.findall(rb'^\s*#\s*include\s*["<]([^">]+)[">]', content, re.MULTILINE)
    folders = (path.parent, *include_dirs)
    places = ([folder / name.decode() for folder in folders] for name in names)
    included = [next(filter(Path.is_file, paths), None) for paths in places]
    return hashlib.sha256(content).digest(), [path for path in included if path is not None]


@functools.cache
def _kernel_cache() -> KernelCache:
    return KernelCache(cache_dir() / "kernels")


@functools.cache
def _include_dirs() -> tuple[Path, Path]:
    """Our headers and CUDA's (cuda_bf16.h, cuda_fp16.h), found the way CuPy finds them: wheels first."""
    from cuda.pathfinder import find_nvidia_header_directory

    cuda_headers = find_nvidia_header_directory("cudart")
    if cuda_headers is None:
        raise DeviceError("CUDA's headers were not found; pip install nvidia-cuda-runtime-cu12")
    return SOURCE_DIR, Path(cuda_headers)
