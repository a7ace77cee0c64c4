"""Descriptions of matrices to Hopper's copy engine; their twin is TensorMap in cuda_src/ptx_sm90.cuh."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numpy as np

from cupaged.errors import DeviceError
from cupaged.kernels.checks import (
    BFLOAT16,
    FLOAT16,
    HALF_TYPES,
    address_of,
    check,
    check_dtype,
    check_that,
    check_vectors,
)
from cupaged.kernels.launch import driver

TENSOR_MAP = np.dtype([("opaque", np.uint64, 16)])  # the driver's CUtensorMap
BOX_COLUMNS = 64  # elements: the 128 bytes that are swizzled
MAX_BOX_ROWS = 256

# (address, rows, columns, dtype, rows of a box, bytes that go to L2) -> a 0-d array of TENSOR_MAP
Encoder = Callable[[int, int, int, np.dtype, int, int], np.ndarray]


class TensorMap(np.ndarray):
    """A 0-d array of TENSOR_MAP. described: (address, rows, columns, dtype, rows of a box, bytes that go to L2)."""

    described: tuple[int, int, int, np.dtype, int, int]


def tensor_map(array, box_rows: int, l2_bytes: int = 256) -> TensorMap:
    """What tells tensor_copy of a matrix [rows, columns], bfloat16 or float16, and of its boxes [box_rows, 64].

    l2_bytes: what is fetched at least when L2 hasn't got it, 64, 128 or 256 (an H200: weight that is read by one thread
    block streams 3 % faster with 128, and what many read comes 1 to 5 % faster with 256).

    Returns what the loader passes by value, the same for each call with the same. A map holds the array's address and
    shape, not what is in it. Raises ValueError for an array whose rows the copy engine can't address: they must be
    multiples of 16 bytes, from a multiple of 16 on.
    """
    check_dtype("array", array, HALF_TYPES)
    check("array", array, (None, None), array.dtype)
    rows, columns = array.shape
    check_vectors("array", array, columns)
    check_that(min(rows, columns) > 0, f"array: must not be empty; got {array.shape}")
    check_that(0 < box_rows <= MAX_BOX_ROWS, f"box_rows: expected 1 to {MAX_BOX_ROWS}; got {box_rows}")
    check_that(l2_bytes in _L2_PROMOTION, f"l2_bytes: expected one of {tuple(_L2_PROMOTION)}; got {l2_bytes}")
    return _cached(_encode, address_of(array), rows, columns, array.dtype, box_rows, l2_bytes)


def set_encoder(encode: Encoder) -> None:
    """Replace the way that maps are made, beside that of loading kernels: the host build has its own."""
    global _encode
    _encode = encode


@functools.lru_cache(maxsize=8192)  # some hundred weights, and a few activations at each number of rows
def _cached(encode: Encoder, *arguments) -> TensorMap:
    encoded = encode(*arguments).view(TensorMap)
    encoded.described = arguments
    encoded.setflags(write=False)
    return encoded


def encode_by_driver(
    address: int, rows: int, columns: int, dtype: np.dtype, box_rows: int, l2_bytes: int
) -> np.ndarray:
    """The default encoder: cuTensorMapEncodeTiled."""
    memory = np.zeros(TENSOR_MAP.itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64  # the driver wants it at a multiple of 64
    encoded = memory[start : start + TENSOR_MAP.itemsize].view(TENSOR_MAP).reshape(())
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(encoded.ctypes.data),
        _DATA_TYPE[dtype],
        2,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(columns * dtype.itemsize),  # bytes from row to row
        (ctypes.c_uint32 * 2)(BOX_COLUMNS, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        _INTERLEAVE_NONE,
        _SWIZZLE_128B,
        _L2_PROMOTION[l2_bytes],
        _OUT_OF_BOUNDS_ZEROS,
    )
    if status != 0:
        raise DeviceError(f"cuTensorMapEncodeTiled: error {status} for a matrix {(rows, columns)} {dtype}")
    return encoded


_encode: Encoder = encode_by_driver

_DATA_TYPE = {FLOAT16: 6, BFLOAT16: 9}  # CU_TENSOR_MAP_DATA_TYPE_..
_INTERLEAVE_NONE = 0
_SWIZZLE_128B = 3
_L2_PROMOTION = {64: 1, 128: 2, 256: 3}
_OUT_OF_BOUNDS_ZEROS = 0
