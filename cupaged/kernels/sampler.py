"""Drawing a token from each row of logits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupaged.backends.base import SAMPLING_ROW
from cupaged.kernels.checks import check, check_that
from cupaged.kernels.compile import load_kernel

NUM_THREADS = 1024  # of the thread block that serves a row: one row alone should use all of a multiprocessor
KERNEL = ("sampler.cu", f"sample<{NUM_THREADS}>")
MAX_VOCAB_SIZE = 1 << 23  # masses of 2^40 add up within 64 bits


def instantiations() -> Iterator[tuple[str, str]]:
    """(file, name) of every kernel that this module launches."""
    yield KERNEL


def sample(token_ids, logits, rows, vocab_size: int) -> None:
    """`Backend.sample`: token_ids [m] int32 from logits [m, >= vocab_size] float32 and rows [m] SAMPLING_ROW."""
    num_rows, row_size = logits.shape
    check("logits", logits, (None, None), np.float32)
    check("token_ids", token_ids, (num_rows,), np.int32)
    check("rows", rows, (num_rows,), SAMPLING_ROW)
    check_that(
        1 <= vocab_size <= min(row_size, MAX_VOCAB_SIZE),
        f"vocab_size: expected 1 to {min(row_size, MAX_VOCAB_SIZE)} for logits {logits.shape}; got {vocab_size}",
    )
    if num_rows == 0:
        return
    args = (token_ids, logits, rows, np.int32(row_size), np.int32(vocab_size))
    load_kernel(*KERNEL)((num_rows,), (NUM_THREADS,), args)
