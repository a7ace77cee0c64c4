"""Fixtures for all tests."""

import pytest


@pytest.fixture(scope="session")
def smollm2_dir():
    """The real SmolLM2-135M-Instruct, fetched on first use: a machine that can't have it fails its tests."""
    from cupaged.weights.hub import resolve

    return resolve(None)
