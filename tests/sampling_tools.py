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


# At this temperature log2(e) / temperature is 1, and a token that lies a whole number n below the largest logit has a
# mass of exactly 2^(40 - n): sums can be made that hit a limit to the unit.
EXACT_TEMPERATURE = np.float32(1.44269504)


def logits_of_mass(mass: int) -> list[float]:
    """Logits of tokens whose masses add up to `mass`, below 2^41, at EXACT_TEMPERATURE next to a largest logit of 0."""
    return [float(bit - 40) for bit in range(40, -1, -1) if mass >> bit & 1]


def top_p_limit(reached: bool) -> tuple[np.ndarray, float]:
    """(logits, top_p) where the first token just about has top_p of the mass, or lacks less than a unit of 2^-40."""
    top_p = np.float32(0.7)
    total = int(2**40 / float(top_p)) + (0 if reached else 1)
    assert (float(top_p) * total <= 2**40) == reached
    return np.float32([0, *logits_of_mass(total - 2**40)]), top_p


def draw_limit(random: int) -> tuple[np.ndarray, int]:
    """(logits, token) where the draw of a 64-bit random number falls on the very limit between token - 1 and token."""
    total = 2**41
    point = random * total >> 64
    before = logits_of_mass(point)
    return np.float32(before + logits_of_mass(total - point)), len(before)
