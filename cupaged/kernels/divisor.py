"""A divisor as kernels take it, so that they needn't divide; its twin is in cuda_src/divisor.cuh."""

from __future__ import annotations

import functools

import numpy as np

from cupaged.kernels.checks import ceil_div

DIVISOR = np.dtype([("value", np.int32), ("shift", np.int32), ("multiplier", np.uint32)])


@functools.cache
def divisor(value: int) -> np.void:
    """A scalar of DIVISOR, which the loader passes by value; 0 < value < 2^31."""
    shift = (value - 1).bit_length()
    return np.array((value, shift, ceil_div(1 << (31 + shift), value)), DIVISOR)[()]
