"""Where a figure was measured: without it the figure means nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

import cupaged
from cupaged.backends.base import Backend

PACKAGES = ("cupy-cuda12x", "cupy-cuda13x", "nvidia-cuda-nvrtc-cu12", "numpy", "tokenizers", "ml_dtypes")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
SOURCE_DIRS = ("cupaged", "cuda_src", "weights", "cli")


def environment(backend: Backend) -> dict[str, Any]:
    """Device, driver, versions, commit and load, for the head of a report."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": backend.description,
        **({"gpu": _gpu()} if backend.name == "cuda" else {}),
        "commit": _commit(Path(cupaged.__file__).parents[1]),
        "cupaged": cupaged.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "cpus": cpus,
        "threads": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def memory(backend: Backend) -> dict[str, int]:
    """The most memory that this process has had so far, in bytes."""
    used = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if backend.name == "cuda":
        import cupy

        used["pool_bytes"] = cupy.get_default_memory_pool().total_bytes()  # which shrinks for nobody here
    return used


def _gpu() -> str | None:
    """Name, driver, clocks and power limit, in nvidia-smi's words; None where there is no nvidia-smi."""
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit"
    return _run(["nvidia-smi", query, "--format=csv,noheader"])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(root: Path) -> str | None:
    """The commit that the sources are at, "-dirty" added where they differ; None outside a git checkout."""
    if not (root / ".git").exists():
        return None
    commit = _run(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    changes = _run(["git", "-C", str(root), "status", "--porcelain", "--", *SOURCE_DIRS])
    return f"{commit}-dirty" if commit and changes else commit


def _run(command: list[str]) -> str | None:
    """What the command prints; None when it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
