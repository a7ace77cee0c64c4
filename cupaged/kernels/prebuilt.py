"""Kernels that `cupaged compile` made ahead: found without NVRTC and CUDA's headers, and only read from.

    <folder>/sm_90a/      a KernelFolder for each architecture, its keys of compile.kernel_key

The folder is $CUPAGED_KERNELS, or else PACKAGE_FOLDER, where there need not be one.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import cupaged
from cupaged.errors import DeviceError
from cupaged.kernels.kernel_cache import KernelFolder

PACKAGE_FOLDER = Path(cupaged.__file__).resolve().parent / "cubins"


def prebuilt_folder() -> Path:
    """Where to look. Raises DeviceError when CUPAGED_KERNELS names no folder."""
    name = os.environ.get("CUPAGED_KERNELS")
    if not name:
        return PACKAGE_FOLDER
    if not Path(name).is_dir():
        raise DeviceError(f"CUPAGED_KERNELS: {name} is no folder; name one that `cupaged compile --out` wrote")
    return Path(name)


def prebuilt_archs() -> Collection[str]:
    """The architectures that there are kernels for ("sm_80", "sm_90a")."""
    return sorted(path.name for path in prebuilt_folder().glob("sm_*"))


def find_prebuilt(key: str, arch: str) -> tuple[Path, str] | None:
    """The path of a kernel's image and its symbol, if it is there."""
    return KernelFolder(prebuilt_folder() / arch).find(key)
