"""The only place that compiles and loads kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Kernel(Protocol):
    """A loaded kernel. Arguments are arrays, 0-d structured NumPy arrays (structs by value), or NumPy scalars
    of the parameter's exact type (np.int32, np.int64, np.float32)."""

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared_mem: int = 0) -> None: ...


def load_from_cubin(file: str, name: str) -> Kernel:
    raise RuntimeError("no loader yet")


_load: Callable[[str, str], Kernel] = load_from_cubin


def set_loader(load: Callable[[str, str], Kernel]) -> None:
    """Replace the way that kernels are loaded: the tests run the same launchers over a build for the host."""
    global _load
    _load = load


def load_kernel(file: str, name: str) -> Kernel:
    """The instantiation `name` (a C++ expression such as "rms_norm<__half, 4>") of cuda_src/`file`."""
    return _load(file, name)
