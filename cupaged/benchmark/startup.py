"""From the start of a process to its first token, with a kernel cache that is empty, and with one that is filled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from cupaged.benchmark.figures import Row, spread
from cupaged.errors import CupagedError

PHASES = ("started", "imported", "loaded", "first_token")


def startup(options: dict[str, Any], *, repeats: int, say: Callable[[str], None]) -> tuple[list[Row], dict[str, Any]]:
    """options: LLM's arguments, the model by an absolute path, which no change of CUPAGED_HOME moves.

    Returns a row for each kind of kernel cache, and environment and memory of the last process. A row holds seconds
    since the process was started until python runs, cupaged is imported, the model is loaded, the first token is
    there. One process goes ahead and doesn't count: after it the model's files are in the page cache, as far as they
    fit. On the CPU no kernels are compiled, and there is one kind of start only. Raises CupagedError.
    """
    with tempfile.TemporaryDirectory(prefix="cupaged-bench-") as home:
        found = _first_token(options, home)
    caches = ("cold", "warm") if found["backend"] == "cuda" else ("none",)
    seconds: dict[str, list[dict[str, float]]] = {cache: [] for cache in caches}
    for repeat in range(repeats):
        with tempfile.TemporaryDirectory(prefix="cupaged-bench-") as home:
            for cache in caches:
                found = _first_token(options, home)
                seconds[cache].append(found["seconds"])
                say(f"repeat {repeat + 1} of {repeats}: {found['seconds']['first_token']:.2f} s, kernel cache {cache}")
    rows = [
        {"kernel_cache": cache, **{f"{phase}_s": spread([times[phase] for times in all_times]) for phase in PHASES}}
        for cache, all_times in seconds.items()
    ]
    return rows, {"environment": found["environment"], "memory": found["memory"]}


def _first_token(options: dict[str, Any], home: str) -> dict[str, Any]:
    """Run one process, with its caches in `home`; returns what it printed, and seconds from its start to PHASES."""
    # The driver and CuPy keep compiled code as well: for a cold start theirs must be cold too.
    folders = {name: os.path.join(home, name) for name in ("CUPAGED_HOME", "CUDA_CACHE_PATH", "CUPY_CACHE_DIR")}
    command = [sys.executable, "-m", "cupaged.benchmark.first_token", json.dumps(options)]
    start = time.monotonic()
    # Started in the source tree, python -m would find that instead of what is installed.
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | folders, cwd=home)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise CupagedError(f"the process that was to be timed failed: {lines[-1]}")
    found = json.loads(result.stdout.splitlines()[-1])
    found["seconds"] = {phase: found["moments"][phase] - start for phase in PHASES}
    return found
