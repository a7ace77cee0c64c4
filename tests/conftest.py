"""Fixtures for all tests."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory):
    """Not in the source tree: a Python started there would find its cupaged/ instead of what is installed."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session")
def smollm2_dir():
    """The real SmolLM2-135M-Instruct, fetched on first use: a machine that can't have it fails its tests."""
    from cupaged.weights.hub import resolve

    return resolve(None)
