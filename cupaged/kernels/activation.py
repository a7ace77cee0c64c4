"""SwiGLU's activation; the kernel is cuda_src/activation.cu."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupaged.kernels.checks import C_TYPE, HALF_TYPES, ceil_div, check, check_dtype, check_vectors
from cupaged.kernels.compile import load_kernel

NUM_THREADS = 256
ELEMENTS_PER_THREAD = 8  # one 16-byte vector


def silu_and_mul(out, gate_up) -> None:
    """out = silu(gate) * up for gate_up [n, 2 * intermediate], the gate half first; out [n, intermediate].

    bf16 or fp16; intermediate is a multiple of 8. Raises ValueError for arrays that don't fit together.
    """
    check_dtype("out", out, HALF_TYPES)
    check("out", out, (None, None), out.dtype)
    num_tokens, intermediate_size = out.shape
    check("gate_up", gate_up, (num_tokens, 2 * intermediate_size), out.dtype)
    check_vectors("out", out, intermediate_size)
    check_vectors("gate_up", gate_up, intermediate_size)
    if num_tokens == 0 or intermediate_size == 0:
        return
    kernel = load_kernel("activation.cu", _name(out.dtype))
    num_chunks = ceil_div(intermediate_size, NUM_THREADS * ELEMENTS_PER_THREAD)
    kernel((num_tokens, num_chunks), (NUM_THREADS,), (out, gate_up, np.int32(intermediate_size)))


def instantiations() -> Iterator[tuple[str, str]]:
    for dtype in HALF_TYPES:
        yield "activation.cu", _name(dtype)


def _name(dtype) -> str:
    return f"silu_and_mul<{C_TYPE[dtype]}, {NUM_THREADS}>"
