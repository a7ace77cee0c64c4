"""Log probabilities of the sampled and of the most likely tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupaged.backends.base import MAX_TOP_TOKENS
from cupaged.kernels.checks import check, check_that
from cupaged.kernels.compile import load_kernel
from cupaged.kernels.row_slices import NUM_THREADS, row_slices

LIKELIEST = ("logprobs.cu", f"logprobs_likeliest<{NUM_THREADS}>")
LOGPROBS = ("logprobs.cu", f"logprobs<{NUM_THREADS}>")


def instantiations() -> Iterator[tuple[str, str]]:
    """(file, name) of every kernel that this module launches."""
    yield LIKELIEST
    yield LOGPROBS


def logprobs(top_ids, top_logprobs, ranks, logits, token_ids, vocab_size: int, workspace) -> None:
    """`Backend.logprobs`: top_ids, top_logprobs [m, 1 + k] int32 / float32 and ranks [m] int32, from logits
    [m, >= vocab_size] float32 and token_ids [m] int32; k at most MAX_TOP_TOKENS.

    workspace: as `sample` wants it; one may serve both.
    """
    num_rows, row_size = logits.shape
    check("logits", logits, (None, None), np.float32)
    check("token_ids", token_ids, (num_rows,), np.int32)
    check("ranks", ranks, (num_rows,), np.int32)
    check("top_ids", top_ids, (num_rows, None), np.int32)
    check("top_logprobs", top_logprobs, top_ids.shape, np.float32)
    k = top_ids.shape[1] - 1
    check_that(0 <= k <= MAX_TOP_TOKENS, f"top_ids: expected 1 to {1 + MAX_TOP_TOKENS} columns; got {1 + k}")
    check_that(
        1 <= vocab_size <= row_size,
        f"vocab_size: expected 1 to {row_size} for logits {logits.shape}; got {vocab_size}",
    )
    if num_rows == 0:
        return
    slices = row_slices(num_rows, vocab_size, workspace)
    sizes = (np.int32(row_size), np.int32(vocab_size), np.int32(k), slices.slices_per_part)
    shares = (workspace, slices.counters_start, *sizes)
    load_kernel(*LIKELIEST)(slices.grid, (NUM_THREADS,), (logits, *shares))
    args = (top_ids, top_logprobs, ranks, logits, token_ids, *shares)
    load_kernel(*LOGPROBS)(slices.grid, (NUM_THREADS,), args)
