"""What the tests of both samplers share: sampling parameters and logits as a model makes them."""

from __future__ import annotations

import numpy as np

from cupaged.backends.base import SAMPLING_ROW


def make_rows(n: int = 1, **values) -> np.ndarray:
    """n rows of SAMPLING_ROW that filter nothing; the values may be arrays [n]."""
    rows = np.zeros(n, SAMPLING_ROW)
    rows["temperature"] = rows["top_p"] = 1
    for name, value in values.items():
        rows[name] = value
    return rows


def random_logits(seed: int, n: int) -> np.ndarray:
    """Distinct ones, float32 [n]: a bell, some far ahead, some far behind."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, 2 * n)
    logits[rng.integers(2 * n, size=1 + n // 25)] += 8
    logits[rng.integers(2 * n, size=1 + n // 25)] -= 60
    logits = rng.permutation(np.unique(logits.astype(np.float32)))[:n]
    assert logits.size == n
    return logits
