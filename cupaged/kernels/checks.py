"""The only array checks and the only dtype table. A launcher checks before it launches: kernels check nothing."""

from __future__ import annotations

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)

# The CUDA C spelling of each storage type.
C_TYPE = {BFLOAT16: "__nv_bfloat16", FLOAT16: "__half", FLOAT32: "float"}
HALF_TYPES = (BFLOAT16, FLOAT16)  # activations, weights and the KV cache; also what the tensor cores take

# The KV cache shapes that kernels are instantiated for: these, and config.BLOCK_SIZES.
HEAD_DIMS = (64, 80, 96, 128, 256)

VECTOR_BYTES = 16  # the widest load and store


def check(name: str, array, shape: tuple[int | None, ...], dtype) -> None:
    """Raise ValueError unless array has this shape (None: any size) and dtype and is C-contiguous."""
    actual = array.shape
    agrees = actual == shape
    if not agrees and None in shape and len(actual) == len(shape):
        agrees = all([want is None or have == want for have, want in zip(actual, shape, strict=True)])
    if agrees and array.dtype == dtype and array.flags.c_contiguous:
        return
    dtype = np.dtype(dtype)
    wanted = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
    layout = "" if array.flags.c_contiguous else ", not C-contiguous"
    raise ValueError(f"{name}: expected shape {wanted} {dtype}, C-contiguous; got {array.shape} {array.dtype}{layout}")


def check_dtype(name: str, array, allowed) -> None:
    """Raise ValueError unless array's dtype is one of `allowed`."""
    if array.dtype not in allowed:
        raise ValueError(f"{name}: dtype must be {' or '.join(map(str, allowed))}; got {array.dtype}")


def check_vectors(name: str, array, row: int) -> None:
    """Raise ValueError unless rows of `row` elements can be moved by 16-byte vectors."""
    if row * array.dtype.itemsize % VECTOR_BYTES:
        raise ValueError(f"{name}: a row must be a multiple of 16 bytes; got {row} elements of {array.dtype}")
    address = address_of(array)
    if address % VECTOR_BYTES:
        raise ValueError(f"{name}: must start at a multiple of 16 bytes; it starts at {address:#x}")


def address_of(array) -> int:
    """Where a CuPy array begins, or a NumPy one (the tests)."""
    return array.ctypes.data if hasattr(array, "ctypes") else array.data.ptr


def check_that(holds: bool, message: str) -> None:
    """Raise ValueError(message) unless `holds`."""
    if not holds:
        raise ValueError(message)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
