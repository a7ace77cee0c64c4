"""Fixtures of kernel tests: `runner`, where kernels run, and `rng`."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from cupaged.backends.cuda import probe
from cupaged.kernels.compile import SOURCE_DIR, load_from_cubin, set_loader
from host.build import HostLoader, find_compiler
from kernel_tools import GpuRunner, HostRunner


def pytest_generate_tests(metafunc):
    if "runner" in metafunc.fixturenames:
        gpu = [pytest.param("gpu", marks=pytest.mark.gpu)] if probe().usable else []
        metafunc.parametrize("runner", ["host", *gpu], indirect=True)


@pytest.fixture
def compiler() -> str:
    """The C++ compiler that builds kernels for the host. Without one the test is skipped, or fails if CI is set."""
    compiler = find_compiler()
    if compiler is None:
        reason = "kernels run on the CPU through g++ (or what CXX names), which is not installed"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return compiler


@pytest.fixture
def runner(request):
    """HostRunner or GpuRunner; launchers load their kernels for it while the test runs.

    On the host, thread blocks and warps run in an order drawn from the test's name; CUPAGED_HOST_SEED draws another,
    and 0 keeps them in order. CUPAGED_HOST_SOURCES names a folder of other sources (tests/host/mutate.py).
    """
    if request.param == "gpu":
        import cupy

        with cupy.cuda.using_allocator(None):  # no pool, so that compute-sanitizer sees where each array ends
            yield GpuRunner()
        return
    request.getfixturevalue("compiler")
    seed = os.environ.get("CUPAGED_HOST_SEED")
    loader = HostLoader(
        Path(os.environ.get("CUPAGED_HOST_SOURCES", SOURCE_DIR)),
        zlib.crc32(request.node.nodeid.encode()) if seed is None else int(seed),
    )
    set_loader(loader)
    yield HostRunner(loader)
    set_loader(load_from_cubin)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
