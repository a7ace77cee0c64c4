"""Changes to logits before a token is drawn from them; see cuda_src/logits.cu."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupaged.backends.base import LOGIT_EDIT
from cupaged.kernels.checks import ceil_div, check, check_that
from cupaged.kernels.compile import load_kernel

NUM_THREADS = 256
IDS_PER_THREAD = 8
EDIT_LOGITS = ("logits.cu", f"edit_logits<{NUM_THREADS}>")
KEEP_ALLOWED = ("logits.cu", f"keep_allowed<{NUM_THREADS}, {IDS_PER_THREAD}>")


def edit_logits(logits, edits) -> None:
    """`Backend.edit_logits`: change the logits [m, n] float32 that edits [e] LOGIT_EDIT name, in place.

    Rows, tokens and that no logit is named twice are device data and aren't checked.
    """
    check("logits", logits, (None, None), np.float32)
    check("edits", edits, (None,), LOGIT_EDIT)
    num_edits, row_size = edits.shape[0], logits.shape[1]
    if num_edits == 0:
        return
    args = (logits, edits, np.int32(num_edits), np.int32(row_size))
    load_kernel(*EDIT_LOGITS)((ceil_div(num_edits, NUM_THREADS),), (NUM_THREADS,), args)


def keep_allowed(logits, rows, masks, vocab_size: int) -> None:
    """`Backend.keep_allowed`: logits [m, >= vocab_size] float32, in place; rows [k] int32 are rows of logits,
    masks [k, ceil(vocab_size / 32)] uint32.

    Rows are device data and aren't checked.
    """
    check("logits", logits, (None, None), np.float32)
    row_size = logits.shape[1]
    check_that(
        1 <= vocab_size <= row_size,
        f"vocab_size: expected 1 to {row_size} for logits {logits.shape}; got {vocab_size}",
    )
    check("rows", rows, (None,), np.int32)
    num_masks = rows.shape[0]
    check("masks", masks, (num_masks, ceil_div(vocab_size, 32)), np.uint32)
    if num_masks == 0:
        return
    grid = (num_masks, ceil_div(vocab_size, NUM_THREADS * IDS_PER_THREAD))
    args = (logits, rows, masks, np.int32(row_size), np.int32(vocab_size))
    load_kernel(*KEEP_ALLOWED)(grid, (NUM_THREADS,), args)


def instantiations() -> Iterator[tuple[str, str]]:
    yield EDIT_LOGITS
    yield KEEP_ALLOWED
