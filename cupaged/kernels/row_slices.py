"""Rows of logits that are shared out among several thread blocks each: see cuda_src/row_slices.cuh."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from cupaged.kernels.checks import ceil_div, check, check_that
from cupaged.kernels.paged_attention import MAX_GRID_YZ

NUM_THREADS = 256  # of a thread block
SLICE_SIZE = 16 * NUM_THREADS  # ids
TARGET_THREAD_BLOCKS = 2048  # of a launch: some for each multiprocessor, and no more to be started than that takes

NUM_BINS = 832
LIST_SIZE = 4096  # tokens
PART_BYTES = 16 + 8 * NUM_BINS  # PartState
STATE_BYTES = 32 + 8 * NUM_BINS  # RowState
COUNTERS_BYTES = 16  # RowCounters


class RowSlices(NamedTuple):
    """How a launch over rows of logits is shared out."""

    grid: tuple[int, int]  # (parts of a row, rows)
    slices_per_part: np.int32
    counters_start: np.int64  # of the workspace's bytes


def row_workspace_size(num_rows: int, vocab_size: int) -> int:
    """Bytes of `workspace` that `sample` and `logprobs` want for up to num_rows rows of up to vocab_size tokens: 24 MB
    for 256 rows of 128,256 tokens."""
    num_slices = ceil_div(vocab_size, SLICE_SIZE)
    most_parts = max(num_rows, min(num_rows * num_slices, TARGET_THREAD_BLOCKS))
    sums_bytes = 16 * ceil_div(num_slices, 4)
    list_bytes = max(8 * LIST_SIZE, 4 * NUM_THREADS * num_slices)  # in turn the list and the groups' maxima
    return most_parts * PART_BYTES + num_rows * (STATE_BYTES + sums_bytes + list_bytes + COUNTERS_BYTES)


def row_slices(num_rows: int, vocab_size: int, workspace) -> RowSlices:
    """Raises ValueError for too many rows or a workspace that doesn't do."""
    check("workspace", workspace, (None,), np.uint8)
    return _row_slices(num_rows, vocab_size, workspace.shape[0])


@functools.lru_cache(maxsize=4096)
def _row_slices(num_rows: int, vocab_size: int, size: int) -> RowSlices:
    check_that(num_rows <= MAX_GRID_YZ, f"logits: expected at most {MAX_GRID_YZ} rows; got {num_rows}")
    wanted = row_workspace_size(num_rows, vocab_size)
    check_that(
        size >= wanted and size % 16 == 0, f"workspace: expected {wanted} bytes or more, in whole 16s; got {size}"
    )
    num_slices = ceil_div(vocab_size, SLICE_SIZE)
    slices_per_part = ceil_div(num_slices, max(1, min(num_slices, TARGET_THREAD_BLOCKS // num_rows)))
    # The counters lie at the end, where no other results come: they must stay zeros between launches.
    counters_start = np.int64(size - num_rows * COUNTERS_BYTES)
    return RowSlices((ceil_div(num_slices, slices_per_part), num_rows), np.int32(slices_per_part), counters_start)
