"""out[i] = weight[ids[i]] in float32; the kernel is cuda_src/embedding.cu."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupaged.kernels.checks import C_TYPE, FLOAT32, check, check_dtype, check_that, check_vectors
from cupaged.kernels.compile import load_kernel

NUM_THREADS = 128  # of 8 elements a turn; rows of SmolLM2-135M have 72 times 8, of Llama-3.1-8B 512


def embedding(out, weight, ids) -> None:
    """out[i] = weight[ids[i]]: weight [rows, hidden] bf16, fp16 or fp32, ids [n] int32, out [n, hidden] fp32.

    hidden is a multiple of 8. An id outside [0, rows) gives a row of zeros. Raises ValueError for arrays that don't
    fit together.
    """
    check_dtype("weight", weight, C_TYPE)
    check("weight", weight, (None, None), weight.dtype)
    check("ids", ids, (None,), np.int32)
    num_rows, hidden_size = weight.shape
    num_ids = ids.shape[0]
    check("out", out, (num_ids, hidden_size), FLOAT32)
    check_that(hidden_size % 8 == 0, f"weight: a row must be a multiple of 8 elements; got {hidden_size}")
    check_vectors("weight", weight, hidden_size)
    check_vectors("out", out, hidden_size)
    if num_ids == 0:
        return
    kernel = load_kernel("embedding.cu", _name(weight.dtype))
    kernel((num_ids,), (NUM_THREADS,), (out, weight, ids, np.int32(num_rows), np.int32(hidden_size)))


def instantiations() -> Iterator[tuple[str, str]]:
    for dtype in C_TYPE:
        yield "embedding.cu", _name(dtype)


def _name(dtype) -> str:
    return f"embedding<{C_TYPE[dtype]}, {NUM_THREADS}>"
