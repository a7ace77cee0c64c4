"""Drawing a token from each row of logits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupaged.backends.base import SAMPLING_ROW
from cupaged.kernels.checks import check, check_that
from cupaged.kernels.compile import load_kernel
from cupaged.kernels.row_slices import NUM_THREADS, row_slices

KERNELS = [("sampler.cu", f"{name}<{NUM_THREADS}>") for name in ("sample_likeliest", "sample_weighed", "sample_top_p")]
MAX_VOCAB_SIZE = 1 << 23  # masses of 2^40 add up within 64 bits


def instantiations() -> Iterator[tuple[str, str]]:
    """(file, name) of every kernel that this module launches."""
    yield from KERNELS


def sample(token_ids, logits, rows, vocab_size: int, workspace, *, greedy: bool = False) -> None:
    """`Backend.sample`: token_ids [m] int32 from logits [m, >= vocab_size] float32 and rows [m] SAMPLING_ROW, all of
    temperature 0 if `greedy` (they are device data and aren't checked).

    workspace: uint8, at least `row_workspace_size` bytes, zeros before its first use; what a launch leaves in it suits
    the next. Launches that share one must follow each other on one stream.
    """
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
    slices = row_slices(num_rows, vocab_size, workspace)
    sizes = (np.int32(row_size), np.int32(vocab_size), slices.slices_per_part)
    args = (token_ids, logits, rows, workspace, slices.counters_start, *sizes)
    for kernel in KERNELS[:1] if greedy else KERNELS:
        load_kernel(*kernel)(slices.grid, (NUM_THREADS,), args)
