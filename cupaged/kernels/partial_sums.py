"""Sums that read an array once, as fast as memory gives it: the ceiling that other kernels are held against."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupaged.kernels.checks import C_TYPE, FLOAT32, VECTOR_BYTES, check, check_that, check_vectors
from cupaged.kernels.compile import load_kernel
from cupaged.kernels.device import device_info

NUM_THREADS = 512
UNROLL = 4  # 16-byte vectors: 32 KB a thread block under way
THREAD_BLOCKS_PER_SM = 4  # which fills the 2048 threads of a data-centre GPU's
KERNEL = ("partial_sums.cu", f"partial_sums<{C_TYPE[FLOAT32]}, {NUM_THREADS}, {UNROLL}>")


def num_partial_sums() -> int:
    """How many sums `partial_sums` writes on this device."""
    return THREAD_BLOCKS_PER_SM * device_info().num_sms


def partial_sums(out, x) -> None:
    """out [num_partial_sums()] float32: sums of parts of x [n] float32 that add up to all of it; n a multiple of 4."""
    check("x", x, (None,), FLOAT32)
    check_vectors("x", x, x.shape[0])
    check("out", out, (num_partial_sums(),), FLOAT32)
    check_that(x.shape[0] > 0, "x: must not be empty")
    load_kernel(*KERNEL)(out.shape, (NUM_THREADS,), (out, x, np.int64(x.shape[0] * x.dtype.itemsize // VECTOR_BYTES)))


def instantiations() -> Iterator[tuple[str, str]]:
    yield KERNEL
