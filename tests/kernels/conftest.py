"""Fixtures of kernel tests: `runner`, where kernels run, `host_build` for the CUDA backend over it, and `rng`."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from host_device import H100, CupyArraysDevice, Launch, NumpyDevice

from cupaged.backends import cuda
from cupaged.backends.cuda import probe
from cupaged.kernels.compile import SOURCE_DIR, load_from_cubin, set_loader
from cupaged.kernels.device import device_info, set_device_info
from cupaged.kernels.tensor_map import encode_by_driver, set_encoder
from host.build import HostLoader, address_sanitizer_is_loaded, encode_tensor_map, find_compiler
from kernel_tools import GpuRunner, HostRunner


def pytest_generate_tests(metafunc):
    if "runner" in metafunc.fixturenames:
        gpu = [pytest.param("gpu", marks=pytest.mark.gpu)] if probe().usable else []
        metafunc.parametrize("runner", ["host", *gpu], indirect=True)


def pytest_collection_modifyitems(config, items):
    """AddressSanitizer takes the place of the host build's own watcher, and ends the process when it finds something:
    the tests of that watcher aren't run under it."""
    if address_sanitizer_is_loaded():
        watcher = [item for item in items if item.get_closest_marker("watcher")]
        config.hook.pytest_deselected(items=watcher)
        items[:] = [item for item in items if item not in watcher]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """In CI a skipped test of a kernel counts as failed, unless it is one for a GPU."""
    report = yield
    if report.skipped and os.environ.get("CI") and not item.get_closest_marker("gpu"):
        report.outcome, report.longrepr = "failed", f"skipped, which CI doesn't allow: {report.longrepr[2]}"
    return report


@pytest.fixture
def compiler() -> str:
    """The C++ compiler that builds kernels for the host."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("kernels run on the CPU through g++ (or what CXX names), which is not installed")
    return compiler


@pytest.fixture
def runner(request):
    """HostRunner or GpuRunner; launchers load their kernels for it while the test runs.

    On the host, thread blocks and warps run in an order drawn from the test's name; CUPAGED_HOST_SEED draws another,
    and 0 keeps them in order. CUPAGED_HOST_SOURCES names a folder of other sources (tests/host/mutate.py).
    """
    if request.param == "gpu":
        import cupy

        if request.node.get_closest_marker("sm90") and device_info().arch != "sm_90a":
            pytest.skip(f"the kernel is for Hopper; this GPU is {device_info().arch}")

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
    set_encoder(encode_tensor_map)
    yield HostRunner(loader)
    set_loader(load_from_cubin)
    set_encoder(encode_by_driver)


@pytest.fixture(params=[NumpyDevice, CupyArraysDevice])
def host_build(request, runner, monkeypatch):
    """(device, names of the kernels that were loaded); nothing is loaded ahead."""
    if not hasattr(runner, "loader"):
        pytest.skip("runs over the host build; a GPU has the tests of whole models")
    device, loaded = request.param(runner), set()

    def load(file, name):
        loaded.add((file, name))
        kernel = runner.loader(file, name)

        def launch(grid, block, args, shared_mem=0):
            device.launch(Launch(name, kernel, grid, block, args, shared_mem))

        return launch

    set_loader(load)
    set_device_info(H100)
    monkeypatch.setenv("CUPAGED_TIER", "portable")  # tests of the other kernels say so
    monkeypatch.setattr(cuda, "load_kernels", lambda kernels: None)
    yield device, loaded
    set_device_info(None)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
