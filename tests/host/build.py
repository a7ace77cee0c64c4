"""The kernels on the CPU: cuda_src/*.cu compiled by g++ against include/, run by the runtime beside this file.

    set_loader(HostLoader())   # from now on launchers take NumPy arrays
    set_encoder(encode_tensor_map)

Every access of a kernel is checked (see memory.cpp): out of bounds, races in shared memory, undefined behaviour; so is
every barrier and shuffle (runtime.cpp). A finding raises HostKernelError with the source line, thread block and thread.
"""

from __future__ import annotations

import ctypes
import functools
import getpass
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from cupaged.kernels.compile import SOURCE_DIR, source_digest
from cupaged.kernels.launch import overlaps
from cupaged.kernels.tensor_map import TENSOR_MAP

HOST_DIR = Path(__file__).resolve().parent
INCLUDE_DIR = HOST_DIR / "include"
RUNTIME_SOURCES = ("runtime.cpp", "memory.cpp", "ptx.cpp")

COMMON_FLAGS = ("-std=c++17", "-g1", "-gdwarf-4", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti")
RUNTIME_FLAGS = (*COMMON_FLAGS, "-O2")
KERNEL_FLAGS = (
    *COMMON_FLAGS,
    "-O1",
    "-fno-strict-aliasing",  # CUDA code reads registers as other types
    "-fno-threadsafe-statics",  # g++ guards static arrays of classes; poison in a guard reads as "done"
    "-ffp-contract=off",
    "-fsanitize=undefined,float-cast-overflow",  # memory.cpp takes the findings
    "-fno-sanitize=vptr",
    *("-Wno-attributes", "-Wno-unknown-pragmas"),
)
OPTIONAL_FLAGS = (  # where the compiler knows them
    "-fno-gnu-unique",  # g++: static shared memory of one library must not be merged with another's
    "-ftrivial-auto-var-init=pattern",  # a local that nobody set holds the same large number each time
)

# A call before every access, with its address and size: memory.cpp takes those too.
WATCH_FLAGS = ("-fsanitize=thread",)

# The compiler's own AddressSanitizer instead, when its library is loaded into the process. It ends the process at the
# first finding. Stacks are left out: it would take fibers for overflows.
#   LD_PRELOAD=$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 pytest tests/kernels
ADDRESS_FLAGS = ("-fsanitize=address", "--param=asan-stack=0", "--param=asan-globals=0")

MAX_THREADS_PER_BLOCK = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_SHARED_BYTES = 227 << 10


class HostKernelError(Exception):
    """A kernel did what it must not do, or was launched with arguments that it doesn't take."""


def find_compiler() -> str | None:
    """g++, or the compiler that CXX names; None when there is none."""
    return shutil.which(os.environ.get("CXX") or "g++")


def address_sanitizer_is_loaded() -> bool:
    """Whether this process runs under libasan."""
    return hasattr(ctypes.CDLL(None), "__asan_init")


class HostLoader:
    """Loads kernels for the host: a loader for cupaged.kernels.compile.set_loader.

    source_dir: where the .cu files are.
    seed: of the order in which thread blocks and warps run; 0 keeps them in order.
    """

    def __init__(self, source_dir: Path = SOURCE_DIR, seed: int = 0):
        self.source_dir = source_dir
        self.seed = seed
        self._arrays: list[np.ndarray] = []
        self._kernels: dict[tuple[str, str], HostKernel] = {}

    def __call__(self, file: str, name: str) -> HostKernel:
        if (file, name) not in self._kernels:
            path = self.source_dir / file
            self._kernels[file, name] = HostKernel(compile_kernel(path, name), name, self, overlaps(path))
        return self._kernels[file, name]

    def allow(self, array: np.ndarray) -> None:
        """Let kernels read and write an array that they reach through a pointer in memory (a table of addresses)."""
        self._arrays.append(array)

    @property
    def allowed_arrays(self) -> Sequence[np.ndarray]:
        return self._arrays


class HostKernel:
    """One instantiation, loaded. Takes NumPy arrays for pointers, NULL for an absent one, 0-d structured arrays for
    structs by value, and NumPy scalars of the parameter's exact type."""

    def __init__(self, path: Path, name: str, loader: HostLoader, overlaps: bool):
        self._path = path
        self._name = name
        self._loader = loader
        self._overlaps = overlaps
        runtime = _runtime()
        self._launch = runtime.cupaged_host_launch
        self._library = ctypes.CDLL(str(path))
        self._library.cupaged_parameters.restype = ctypes.POINTER(_Parameter)
        self._parameters = self._library.cupaged_parameters()[: self._library.cupaged_num_parameters()]
        self._library.cupaged_static_shared_begin.restype = ctypes.c_void_p
        self._library.cupaged_static_shared_end.restype = ctypes.c_void_p
        self._static_begin = self._library.cupaged_static_shared_begin()
        self._static_end = self._library.cupaged_static_shared_end()

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared_mem: int = 0) -> None:
        grid, block = (tuple(map(int, size)) + (1,) * (3 - len(size)) for size in (grid, block))
        self._check_size(grid, block, shared_mem)
        values, regions = self._marshal(args)
        launch = _Launch(
            call=ctypes.cast(self._library.cupaged_call, ctypes.c_void_p),
            args=(ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values)),
            grid=grid,
            block=block,
            seed=self._loader.seed,
            static_begin=self._static_begin,
            static_end=self._static_end,
            regions=(_Region * len(regions))(*regions),
            num_regions=len(regions),
            overlaps=self._overlaps,
            shared_bytes=shared_mem,
        )
        self._launch(ctypes.byref(launch))
        if launch.error:
            raise HostKernelError(f"{self._name}: {launch.error.decode()}{self._call_chain(launch)}")

    def _check_size(self, grid, block, shared_mem) -> None:
        threads = block[0] * block[1] * block[2]
        if min(block) < 1 or threads > MAX_THREADS_PER_BLOCK:
            raise HostKernelError(f"{self._name}: a thread block of {block} threads")
        if any(not 1 <= size <= limit for size, limit in zip(grid, MAX_GRID, strict=True)):
            raise HostKernelError(f"{self._name}: a grid of {grid} thread blocks")
        shared = shared_mem + self._static_end - self._static_begin
        if shared_mem < 0 or shared > MAX_SHARED_BYTES:
            raise HostKernelError(f"{self._name}: {shared} bytes of shared memory")

    def _marshal(self, args: tuple) -> tuple[list[np.ndarray], list[_Region]]:
        """Each argument's value as an array in memory, and the memory that the kernel may touch."""
        if len(args) != len(self._parameters):
            raise HostKernelError(f"{self._name}: takes {len(self._parameters)} arguments, got {len(args)}")
        values = []
        regions = [
            _region(array, True, f"an array {array.dtype}{array.shape}") for array in self._loader.allowed_arrays
        ]
        for index, (parameter, arg) in enumerate(zip(self._parameters, args, strict=True)):
            is_pointer = parameter.kind in (b"p", b"c")
            if isinstance(arg, np.ndarray) and (is_pointer or arg.dtype.names is None):
                self._check_array(index, parameter, arg)
                values.append(np.array(arg.ctypes.data, np.uint64))
                regions.append(_region(arg, parameter.kind == b"p", f"argument {index}, {arg.dtype}{arg.shape}"))
            else:
                self._check_value(index, parameter, arg)
                values.append(np.array(arg))
        return values, regions

    def _check_array(self, index: int, parameter: _Parameter, array: np.ndarray) -> None:
        where = f"{self._name}: argument {index}"
        if parameter.kind not in (b"p", b"c"):
            raise HostKernelError(f"{where} is not a pointer, got an array {array.dtype}{array.shape}")
        if not array.flags.c_contiguous:
            raise HostKernelError(f"{where}: array {array.dtype}{array.shape} is not C-contiguous")
        if parameter.pointee > 1 and parameter.pointee != array.itemsize:
            raise HostKernelError(
                f"{where} points to elements of {parameter.pointee} bytes, got an array {array.dtype}{array.shape}"
            )

    def _check_value(self, index: int, parameter: _Parameter, value) -> None:
        where = f"{self._name}: argument {index}"
        if not isinstance(value, np.generic | np.ndarray):
            raise HostKernelError(f"{where}: {type(value).__name__} has no fixed size; pass a NumPy scalar or array")
        kind = {"i": "iub", "f": "f", "s": "V", "p": "u", "c": "u"}[parameter.kind.decode()]
        if value.dtype.kind not in kind or value.itemsize != parameter.size:
            raise HostKernelError(
                f"{where}: expected {_KINDS[parameter.kind]} of {parameter.size} bytes, got {value.dtype}"
            )
        if parameter.kind in (b"p", b"c") and value != 0:
            raise HostKernelError(f"{where}: an address as a number; pass the array")

    def _call_chain(self, launch: _Launch) -> str:
        """Where in the kernel that was, innermost call first, if the binutils are there to tell."""
        if not launch.fault_pc or not shutil.which("addr2line"):
            return ""
        offset = launch.fault_pc - launch.image - 1  # the call stands before its return address
        lines = _run(["addr2line", "-e", str(self._path), "-i", "-s", hex(offset)]).stdout.split("\n")
        lines = [line.split(" ")[0] for line in lines if line and "?" not in line]
        return f" at {', called at '.join(lines)}" if lines else ""


_KINDS = {b"i": "an integer", b"f": "a float", b"s": "a struct", b"p": "an array", b"c": "an array"}


class _Parameter(ctypes.Structure):  # include/entry.h
    _fields_ = (("kind", ctypes.c_char), ("size", ctypes.c_uint), ("pointee", ctypes.c_uint))


class _Region(ctypes.Structure):  # state.h
    _fields_ = (
        ("begin", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("writable", ctypes.c_int),
        ("name", ctypes.c_char_p),
    )


class _Launch(ctypes.Structure):  # state.h
    _fields_ = (
        ("call", ctypes.c_void_p),
        ("args", ctypes.POINTER(ctypes.c_void_p)),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("seed", ctypes.c_ulonglong),
        ("static_begin", ctypes.c_void_p),
        ("static_end", ctypes.c_void_p),
        ("regions", ctypes.POINTER(_Region)),
        ("num_regions", ctypes.c_int),
        ("overlaps", ctypes.c_int),
        ("shared_bytes", ctypes.c_uint),
        ("fault_pc", ctypes.c_void_p),
        ("image", ctypes.c_void_p),
        ("error", ctypes.c_char * 4096),
    )


def _region(array: np.ndarray, writable: bool, name: str) -> _Region:
    begin = array.ctypes.data
    return _Region(begin, begin + array.nbytes, writable, name.encode())


def encode_tensor_map(
    address: int, rows: int, columns: int, dtype: np.dtype, box_rows: int, l2_bytes: int
) -> np.ndarray:
    """What include/ptx_sm90_host.h takes a TensorMap for: an encoder for cupaged.kernels.tensor_map.set_encoder."""
    encoded = np.zeros((), TENSOR_MAP)
    encoded["opaque"][:5] = address, rows, columns, box_rows, l2_bytes
    return encoded


# -- compiling ------------------------------------------------------------------------------------------------


def compile_kernel(path: Path, name: str) -> Path:
    """A shared library with instantiation `name` of the .cu file at path, from the cache or compiled into it."""
    includes = (path.parent, INCLUDE_DIR, SOURCE_DIR)
    source = f'#include "{path.name}"\n#include "entry.h"\nCUPAGED_HOST_KERNEL({name})\n'
    key = [source_digest(file, includes) for file in (path, INCLUDE_DIR / "shim.h", INCLUDE_DIR / "entry.h")]
    sanitizer = ADDRESS_FLAGS if address_sanitizer_is_loaded() else WATCH_FLAGS
    flags = (*KERNEL_FLAGS, *known_flags(_compiler()), *sanitizer)
    flags += ("-include", "shim.h", *(f"-I{folder}" for folder in includes))
    return _build(path.stem, source, key, flags)


@functools.cache
def _runtime() -> ctypes.CDLL:
    """The runtime, loaded where kernels find its symbols."""
    key = [source_digest(HOST_DIR / file, (HOST_DIR, INCLUDE_DIR)) for file in RUNTIME_SOURCES]
    source = "".join(f'#include "{file}"\n' for file in RUNTIME_SOURCES)
    library = _build("runtime", source, key, (*RUNTIME_FLAGS, f"-I{HOST_DIR}", f"-I{INCLUDE_DIR}"))
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _build(stem: str, source: str, key: Sequence[bytes], flags: Sequence[str]) -> Path:
    """Compile C++ text to a shared library; its name holds the digest of all that it depends on: text, flags, compiler
    and `key`, the digests of the files that it includes."""
    compiler = _compiler()
    digest = hashlib.sha256(repr((_compiler_version(compiler), source, *flags, *key)).encode()).hexdigest()
    library = _cache_dir() / f"{stem}-{digest[:32]}.so"
    # The lock is for processes side by side (pytest-xdist): the second takes what the first has built.
    with FileLock(library.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=_cache_dir()) as folder:
        if library.exists():
            return library
        text, compiled, linked = (Path(folder) / f"{stem}-host{suffix}" for suffix in (".cpp", ".o", ".so"))
        text.write_text(source)
        # Two steps: linking with -fsanitize would bring in the sanitizers' own libraries.
        for command in (
            [compiler, *flags, "-c", str(text), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked)],
        ):
            result = _run(command)
            if result.returncode:
                raise RuntimeError(f"{stem} doesn't compile for the host:\n{source}\n{result.stderr}")
        os.replace(linked, library)  # whole or not at all, for other processes
    return library


def _compiler() -> str:
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler: install g++, or set CXX")
    return compiler


@functools.cache
def _compiler_version(compiler: str) -> str:
    return _run([compiler, "--version"]).stdout


@functools.cache
def known_flags(compiler: str) -> tuple[str, ...]:
    """Those of OPTIONAL_FLAGS that the compiler knows."""
    probe = [compiler, "-Werror", "-fsyntax-only", "-x", "c++", "/dev/null"]
    return tuple(flag for flag in OPTIONAL_FLAGS if _run([*probe, flag]).returncode == 0)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # no libasan in there
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def _cache_dir() -> Path:
    folder = Path(tempfile.gettempdir()) / f"cupaged-host-build-{getpass.getuser()}"
    folder.mkdir(exist_ok=True)
    return folder
