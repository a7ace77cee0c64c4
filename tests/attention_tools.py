"""What the tests of both attention kernels share: queries that show mistakes, the formula, the bound on errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pytest

from kernel_tools import SMALLEST_SUBNORMAL, UNIT_ROUNDOFF


def with_kernels(cases: Iterable, portable: Mapping, sm90: Mapping) -> list:
    """(case, kernels) for each case: the portable kernels and, for the head_dims that have one, Hopper's own.

    portable, sm90: head_dim -> what makes the kernel, as the launchers take it.
    """
    return [
        pytest.param(case, kernels, id=f"{tier}-{case}", marks=marks)
        for tier, kernels, marks in (("portable", portable, ()), ("sm90", sm90, pytest.mark.sm90))
        for case in cases
        if tier == "portable" or sm90[case.head_dim] is not portable[case.head_dim]
    ]


def both_tiers(portable: Mapping, sm90: Mapping):
    """A test's `kernels`, of each tier."""
    return pytest.mark.parametrize(
        "kernels", [pytest.param(portable, id="portable"), pytest.param(sm90, id="sm90", marks=pytest.mark.sm90)]
    )


def pointed_query(rng: np.random.Generator, keys: np.ndarray, positions: Iterable[int], group: int) -> np.ndarray:
    """A query token [num_kv_heads * group, head_dim] in the dtype of keys [seq_len, num_kv_heads, head_dim].

    The keys at `positions` that exist draw most of the attention of all heads: a kernel that leaves out one that it
    should see, or sees one that it shouldn't, gives another result, however many keys there are.
    """
    seq_len, num_kv_heads, head_dim = keys.shape
    query = rng.standard_normal((num_kv_heads, group, head_dim))
    gain = (2 + np.log(max(seq_len, 1))) / np.sqrt(head_dim)  # a score of ln(seq_len) balances the other keys
    for position in positions:
        if 0 <= position < seq_len:
            key = keys[position].astype(np.float64)
            query += gain * (key / np.sqrt((key**2).mean(axis=-1, keepdims=True)))[:, None]
    return query.reshape(-1, head_dim).astype(keys.dtype)


def pack_qkv(query: np.ndarray, num_kv_heads: int) -> np.ndarray:
    """query [num_tokens, num_heads, head_dim] as the leading columns of qkv; what stands behind them is NaN."""
    num_tokens, num_heads, head_dim = query.shape
    qkv = np.full((num_tokens, num_heads + 2 * num_kv_heads, head_dim), np.nan, query.dtype)
    qkv[:, :num_heads] = query
    return qkv.reshape(num_tokens, -1)


def attention_reference(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, sm_scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """One token's attention in float64: (expected, bound on the kernel's error), both [num_heads, head_dim].

    query [num_heads, head_dim]; keys, values [num_keys, num_kv_heads, head_dim]: all of what it attends to.

    The bound counts roundings. 2^-23 stands for one in float32, as tensor cores truncate.
      score:    one for each product, at most that part of the sum of magnitudes; one at the product with the scale and
                one at the subtraction of the maximum; 2^x adds two units.
      weight:   its score's error is its relative error, in the sum too; one rounding to the storage type, with an
                absolute error where that is subnormal, before it meets the value.
      sums:     one for each key and a few for moving to new maxima and merging, over keys and over weights.
      store:    one to the storage type.
    """
    dtype, unit = query.dtype, 2.0**-23
    query, keys, values = (array.astype(np.float64) for array in (query, keys, values))
    num_heads, head_dim = query.shape
    num_keys, num_kv_heads, _ = keys.shape
    expected, bound = np.zeros(query.shape), np.zeros(query.shape)
    if num_keys == 0:
        return expected, bound
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        key, value = keys[:, kv_head], values[:, kv_head]
        scores = sm_scale * (key @ query[head])
        weights = np.exp(scores - scores.max())
        total = weights.sum()
        weights /= total
        magnitudes = sm_scale * (np.abs(key) @ np.abs(query[head]))
        weight_errors = unit * ((head_dim + 1) * magnitudes + 2 * (np.abs(scores) + np.abs(scores).max()) + 4)

        out = weights @ value
        weighed = weights @ np.abs(value)
        error = (weights * weight_errors) @ (np.abs(value) + np.abs(out))
        error += UNIT_ROUNDOFF[dtype] * weighed
        error += SMALLEST_SUBNORMAL[dtype] / 2 * np.abs(value).sum(axis=0) / total
        error += (num_keys + 64) * unit * (weighed + np.abs(out))
        expected[head] = out
        bound[head] = error + UNIT_ROUNDOFF[dtype] * (np.abs(out) + error) + SMALLEST_SUBNORMAL[dtype]
    return expected, bound


def assert_teeth(expected: np.ndarray, bound: np.ndarray) -> None:
    """Assert that the bound is small beside what is expected, or else anything would pass."""
    assert np.median(np.abs(expected)) > 20 * np.median(bound)
