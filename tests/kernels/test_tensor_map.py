"""tensor_map.py: what is asked of the driver. Kernels that copy by maps show that it means what they take it for."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

from cupaged.errors import DeviceError
from cupaged.kernels import tensor_map as module
from cupaged.kernels.checks import BFLOAT16, FLOAT16, FLOAT32
from cupaged.kernels.tensor_map import TENSOR_MAP, encode_by_driver, set_encoder, tensor_map


@pytest.fixture
def encoded():
    """The arguments of all maps that were encoded."""
    calls = []
    set_encoder(lambda *args: calls.append(args) or np.zeros((), TENSOR_MAP))
    yield calls
    set_encoder(encode_by_driver)


def test_a_map_is_made_once_for_an_address_and_shape(encoded):
    array = np.zeros((6, 64), FLOAT16)
    first = tensor_map(array, 8)
    assert tensor_map(array, 8) is first
    assert not first.flags.writeable
    assert encoded == [(array.ctypes.data, 6, 64, FLOAT16, 8, 256)]
    tensor_map(array, 16)
    tensor_map(array[:5], 8)
    tensor_map(array.view(BFLOAT16), 8)
    tensor_map(array[1:], 8)
    tensor_map(array, 8, 128)
    assert len(encoded) == 6


@pytest.mark.parametrize(
    ("array", "box_rows", "message"),
    [
        (np.zeros((4, 64), FLOAT32), 8, "array: dtype must be"),
        (np.zeros(64, FLOAT16), 8, "array: expected shape"),
        (np.zeros((4, 12), FLOAT16), 8, "array: a row must be a multiple of 16 bytes"),
        (np.zeros((4, 64), FLOAT16)[:, :32], 8, "C-contiguous"),
        (np.zeros((0, 64), FLOAT16), 8, "array: must not be empty"),
        (np.zeros((4, 64), FLOAT16), 257, "box_rows: expected 1 to 256"),
    ],
)
def test_what_the_copy_engine_cannot_address_is_refused(encoded, array, box_rows, message):
    with pytest.raises(ValueError, match=message):
        tensor_map(array, box_rows)
    assert not encoded


def test_other_sizes_for_l2_are_refused(encoded):
    with pytest.raises(ValueError, match=r"l2_bytes: expected one of \(64, 128, 256\); got 32"):
        tensor_map(np.zeros((4, 64), FLOAT16), 8, 32)
    assert not encoded


def test_the_driver_gets_what_cuda_documents(monkeypatch):
    calls = []

    def encode(out, dtype, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill):
        assert out.value % 64 == 0
        ctypes.memset(out.value, 0xAB, 128)
        shape = map(tuple, (sizes, strides, box, steps))
        calls.append((dtype, rank, address.value, *shape, interleave, swizzle, promotion, fill))
        return 0

    monkeypatch.setattr(module, "driver", lambda: SimpleNamespace(cuTensorMapEncodeTiled=encode))
    encoded = encode_by_driver(0x7000_0000_0000, 100, 72, BFLOAT16, 32, 128)
    assert encoded.tobytes() == b"\xab" * 128
    # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, innermost dimension first, no interleave, SWIZZLE_128B, L2_PROMOTION_L2_128B,
    # zeros past the edges
    assert calls == [(9, 2, 0x7000_0000_0000, (72, 100), (144,), (64, 32), (1, 1), 0, 3, 2, 0)]


def test_what_the_driver_refuses_is_an_error(monkeypatch):
    monkeypatch.setattr(module, "driver", lambda: SimpleNamespace(cuTensorMapEncodeTiled=lambda *_: 1))
    with pytest.raises(DeviceError, match="error 1"):
        encode_by_driver(0x1000, 1, 64, FLOAT16, 8, 256)
