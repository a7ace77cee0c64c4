"""Rotary position embeddings: tables of the angles' cosines and sines."""

from __future__ import annotations

import math

import numpy as np

from cupaged.config import RopeConfig


def cos_sin_table(rope: RopeConfig, head_dim: int, max_positions: int) -> np.ndarray:
    """[max_positions, rotary_dim] float32: row p holds cos(p * inv_freq_i) for i < rotary_dim/2, then the sines.

    rotary_dim is rope.rotary_dim, or head_dim when that is 0. Angles are taken in float64: at position 100,000 a
    float32 angle is off by up to 0.004. For "yarn" both halves are scaled by the attention factor.

    exp(i a) exp(i b) = exp(i (a + b)), so that of each frequency only two times the root of max_positions cosines and
    sines are computed: 0.3 s would go into those of 131,072 positions.
    """
    rotary_dim = rope.rotary_dim or head_dim
    frequencies = inverse_frequencies(rope, rotary_dim)
    step = max(1, math.isqrt(max_positions))
    near = np.exp(1j * np.outer(np.arange(step), frequencies))
    far = np.exp(1j * np.outer(np.arange(0, max_positions, step), frequencies))
    if rope.kind == "yarn":
        far *= _attention_factor(rope)
    table = np.empty((len(far), step, rotary_dim), np.float32)
    product = np.empty_like(near)
    for rows, turned in zip(table, far, strict=True):
        np.multiply(near, turned, out=product)
        rows[:, : rotary_dim // 2], rows[:, rotary_dim // 2 :] = product.real, product.imag
    return table.reshape(-1, rotary_dim)[:max_positions]


def inverse_frequencies(rope: RopeConfig, rotary_dim: int) -> np.ndarray:
    """[rotary_dim / 2] float64: radians a position for each pair, theta^(-2i / rotary_dim) before scaling.

    Raises ValueError for a kind it does not know.
    """
    plain = rope.theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        kept = _kept_by_llama3(rope, plain)
    elif rope.kind == "yarn":
        kept = _kept_by_yarn(rope, rotary_dim)
    else:
        raise ValueError(f"rope.kind must be default, linear, llama3 or yarn; got {rope.kind!r}")
    return kept * plain + (1 - kept) * plain / rope.factor


def _kept_by_llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """How much of each plain frequency is kept: 1 where the original context holds at least high_freq_factor
    turns, 0 where it holds at most low_freq_factor, linear in the turns between."""
    turns = rope.original_max_position_embeddings * plain / (2 * math.pi)
    return np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)


def _kept_by_yarn(rope: RopeConfig, rotary_dim: int) -> np.ndarray:
    """As above, but linear in the pair's index, from the pair that turns beta_fast times within the original context
    to the one that turns beta_slow times."""

    def pair_that_turns(times: float) -> float:
        wavelength = rope.original_max_position_embeddings / (2 * math.pi * times)
        return rotary_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    first = max(math.floor(pair_that_turns(rope.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(rope.beta_slow)), rotary_dim - 1)
    width = max(last - first, 0.001)  # a step when they coincide
    return 1 - np.clip((np.arange(rotary_dim // 2) - first) / width, 0, 1)


def _attention_factor(rope: RopeConfig) -> float:
    """YaRN's temperature on q.k, shared between q and k by scaling both tables."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 0.1 * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0
