"""Every instantiation that is shipped: what can be compiled ahead, and what CI compiles for every architecture."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from cupaged.kernels.compile import SOURCE_DIR


def instantiations() -> Iterator[tuple[str, str]]:
    """All (file, name) pairs for load_kernel, by the launchers' own word.

    The launcher of cuda_src/x.cu is the module cupaged.kernels.x. It has a function `instantiations()` that yields a
    pair for each instantiation that it may ask for, made by the same function that names them at the launch.
    """
    for source in sorted(SOURCE_DIR.glob("*.cu")):
        yield from importlib.import_module(f"cupaged.kernels.{source.stem}").instantiations()
