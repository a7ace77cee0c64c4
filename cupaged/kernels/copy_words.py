"""Copies of few bytes between the device and pinned host memory; the kernel is cuda_src/copy_words.cu."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupaged.kernels.checks import ceil_div, check_that
from cupaged.kernels.compile import load_kernel

NUM_THREADS = 256
WORD_BYTES = 4
WORDS = np.dtype([("dst", np.uint64), ("src", np.uint64), ("count", np.int64)])  # Words in copy_words.cu
COPY_WORDS = ("copy_words.cu", f"copy_words<{NUM_THREADS}>")


def copy_words(dst: int, src: int, num_bytes: int) -> None:
    """Copy num_bytes, whole words of 4 bytes, from address src to address dst, multiples of 4, in device memory or in
    page-locked host memory. Raises ValueError for parts of words."""
    for name, value in (("dst", dst), ("src", src), ("num_bytes", num_bytes)):
        check_that(value % WORD_BYTES == 0, f"{name}: must be a multiple of {WORD_BYTES}; got {value}")
    num_words = num_bytes // WORD_BYTES
    if num_words == 0:
        return
    words = np.array((dst, src, num_words), WORDS)
    load_kernel(*COPY_WORDS)((ceil_div(num_words, NUM_THREADS),), (NUM_THREADS,), (words,))


def instantiations() -> Iterator[tuple[str, str]]:
    yield COPY_WORDS
