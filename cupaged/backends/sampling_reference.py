"""Sampling, what precedes it, and log probabilities in NumPy: what the backend's operations of these names mean.

`sample` computes the very integers that sampler.cu does, so both draw the same token from the same logits, bit for
bit. Only the filters work differently: by partition and sort here, by radix descents there.
"""

from __future__ import annotations

import numpy as np

_MASS_BITS = 40
_MAX_MASS = 1 << _MASS_BITS
_LOG2_E = np.float32(1.44269504)
# 1 - 2^-f = f * q(f) on [0, 1]: q as unsigned fractions of 2^32, from the highest power down, signs alternating.
_EXP2_COEFFICIENTS = (0x0007346C, 0x0053B871, 0x0273FAE0, 0x0E34BE42, 0x3D7F5DDE, 0xB1721670)


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four 32-bit words that look random, as a function of four counter words and two key words."""
    mask = 0xFFFFFFFF
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = product1 >> 32 ^ x1 ^ k0, product1 & mask, product0 >> 32 ^ x3 ^ k1, product0 & mask
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    return x0, x1, x2, x3


def philox_u64(seed: int, counter: int) -> int:
    """The 64-bit number that a sequence with this seed draws for its token number `counter`."""
    mask = 0xFFFFFFFF
    low, high, _, _ = philox4x32((counter & mask, counter >> 32, 0, 0), (seed & mask, seed >> 32))
    return high << 32 | low


def token_masses(logits: np.ndarray, temperature: float) -> np.ndarray:
    """floor(2^40 * exp((logits - max) / temperature)) as uint64 [n], for float32 logits [n] without NaN.

    One float32 subtraction, product and truncation to 26 fraction bits, then integer arithmetic whose relative error
    is below 2^-27: the same bits on every machine.
    """
    top = logits.max()
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        gap = np.where(logits == top, np.float32(0), top - logits)  # inf - inf is a tie with the maximum
        exponent = np.where(gap > 0, np.minimum(gap * (_LOG2_E / np.float32(temperature)), np.float32(63)), 0)
    fixed = (exponent.astype(np.float32) * np.float32(1 << 26)).astype(np.uint64)
    fraction = fixed << np.uint64(6) & np.uint64(0xFFFFFFFF)
    q = np.full_like(fraction, _EXP2_COEFFICIENTS[0])
    for coefficient in _EXP2_COEFFICIENTS[1:]:
        q = np.uint64(coefficient) - (fraction * q >> np.uint64(32))
    return np.uint64(_MAX_MASS) - (fraction * q >> np.uint64(64 - _MASS_BITS)) >> (fixed >> np.uint64(26))


def kept_masses(logits: np.ndarray, row: np.ndarray) -> np.ndarray:
    """The masses uint64 [n] of the tokens that min_p, top_k and top_p keep, 0 for the others.

    logits float32 [n] without NaN, the largest above -inf; row: one SAMPLING_ROW with a temperature above 0.
    """
    masses = token_masses(logits, row["temperature"])
    min_mass = int(np.ceil(float(row["min_p"]) * _MAX_MASS))
    masses[masses < min_mass] = 0

    top_k = int(row["top_k"])
    if 0 < top_k < logits.size:
        masses[logits < np.partition(logits, -top_k)[-top_k]] = 0

    top_p = float(row["top_p"])
    if top_p < 1:
        kept = np.flatnonzero(masses)
        descending = kept[np.argsort(-logits[kept])]
        running = np.cumsum(masses[descending])
        target = max(1, -(-int(top_p * 2**64) * int(running[-1]) >> 64))  # ceil(top_p * total)
        last = descending[np.searchsorted(running, np.uint64(target))]
        masses[logits < logits[last]] = 0
    return masses


def keep_allowed(logits: np.ndarray, rows: np.ndarray, masks: np.ndarray, vocab_size: int) -> None:
    """`Backend.keep_allowed`."""
    for row, mask in zip(rows.tolist(), masks, strict=True):
        allowed = np.unpackbits(mask.astype("<u4").view(np.uint8), bitorder="little", count=vocab_size)
        logits[row, :vocab_size][allowed == 0] = -np.inf


def edit_logits(logits: np.ndarray, edits: np.ndarray) -> None:
    """`Backend.edit_logits`."""
    place = edits["row"], edits["token"]
    repetition_penalty = edits["repetition_penalty"]
    with np.errstate(invalid="ignore", over="ignore"):
        values = logits[place] + edits["bias"]
        values = np.where(values > 0, values / repetition_penalty, values * repetition_penalty) - edits["penalty"]
    logits[place] = np.where(edits["bias"] == -np.inf, -np.inf, values)


def sample(token_ids: np.ndarray, logits: np.ndarray, rows: np.ndarray, vocab_size: int) -> None:
    """`Backend.sample`: a token id for each row of logits, -1 where no logit is above -inf."""
    for i, row in enumerate(rows):
        token_ids[i] = _sample_row(logits[i, :vocab_size], row)


def _sample_row(logits: np.ndarray, row: np.ndarray) -> int:
    best = int(logits.argmax())  # the first of equals, or the first NaN
    if np.isnan(logits[best]):
        logits = _without_nan(logits)
        best = int(logits.argmax())
    if logits[best] == -np.inf:
        return -1
    if not row["temperature"] > 0:
        return best
    running = np.cumsum(kept_masses(logits, row))
    point = philox_u64(int(row["seed"]), int(row["counter"])) * int(running[-1]) >> 64
    return int(np.searchsorted(running, np.uint64(point), side="right"))


def logprobs(
    top_ids: np.ndarray,
    top_logprobs: np.ndarray,
    ranks: np.ndarray,
    logits: np.ndarray,
    token_ids: np.ndarray,
    vocab_size: int,
) -> None:
    """`Backend.logprobs`. A token id out of range has log probability -inf; columns past the vocabulary hold -1 and
    -inf."""
    k = top_ids.shape[1] - 1
    top_ids[:, 1:] = -1
    top_logprobs[...] = -np.inf
    top_ids[:, 0] = token_ids
    for i, token in enumerate(token_ids):
        row = _without_nan(logits[i, :vocab_size])
        top = row.max()
        in_vocabulary = 0 <= token < vocab_size
        logit = row[token] if in_vocabulary else -np.inf
        ranks[i] = 1 + np.count_nonzero(row > logit)
        if top == -np.inf:
            top_ids[i, 1:][:vocab_size] = np.arange(min(k, vocab_size))
            continue
        with np.errstate(invalid="ignore", over="ignore"):
            gap = np.where(row == top, np.float32(0), row - top)
        log_softmax = gap - np.log(np.exp(gap).sum(dtype=np.float64))
        if in_vocabulary:
            top_logprobs[i, 0] = log_softmax[token]
        best = _most_likely(row, k)
        top_ids[i, 1 : 1 + best.size] = best
        top_logprobs[i, 1 : 1 + best.size] = log_softmax[best]


def _most_likely(logits: np.ndarray, k: int) -> np.ndarray:
    """The min(k, n) ids with the largest logits, in order, the lowest id first on a tie."""
    k = min(k, logits.size)
    if k == 0:
        return np.empty(0, np.int64)
    smallest = np.partition(logits, -k)[-k]
    above = np.flatnonzero(logits > smallest)
    ids = np.concatenate([above, np.flatnonzero(logits == smallest)[: k - above.size]])
    return ids[np.argsort(-logits[ids], kind="stable")]


def _without_nan(logits: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(logits), np.float32(-np.inf), logits)
