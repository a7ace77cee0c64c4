"""Tokens that the step before has drawn, taken on the device; the kernel is cuda_src/take_tokens.cu."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupaged.kernels.checks import ceil_div, check
from cupaged.kernels.compile import load_kernel

NUM_THREADS = 128
TAKE_TOKENS = ("take_tokens.cu", f"take_tokens<{NUM_THREADS}>")


def take_tokens(token_ids, drawn) -> None:
    """`Backend.take_tokens`: token_ids[i] = drawn[~token_ids[i]] where token_ids[i] is negative, for token_ids [n] and
    drawn [m] int32, which must not overlap.

    A row that `drawn` has not is left as it stands. Raises ValueError for other arrays.
    """
    check("token_ids", token_ids, (None,), np.int32)
    check("drawn", drawn, (None,), np.int32)
    num_tokens = token_ids.shape[0]
    if num_tokens == 0:
        return
    args = (token_ids, drawn, np.int32(num_tokens), np.int32(drawn.shape[0]))
    load_kernel(*TAKE_TOKENS)((ceil_div(num_tokens, NUM_THREADS),), (NUM_THREADS,), args)


def instantiations() -> Iterator[tuple[str, str]]:
    yield TAKE_TOKENS
