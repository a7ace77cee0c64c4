"""Which backend runs a model, and why."""

from __future__ import annotations

import numpy as np

from cupaged.backends.base import Backend
from cupaged.errors import DeviceError


def choose_device(device: str) -> tuple[bool, str]:
    """Whether to use the GPU, and why. device: "auto", "cuda" or "cpu". Raises DeviceError when "cuda" can't be."""
    if device == "cpu":
        return False, "as was asked for"
    from cupaged.backends.cuda import probe

    found = probe()
    if found.usable:
        return True, "as it is a usable GPU" if device == "auto" else "as was asked for"
    if device == "cuda":
        raise DeviceError(f"device 'cuda' can't be used: {found.text}")
    return False, f"as there is no usable GPU: {found.text}"


def choose_dtype(dtype: str, checkpoint_dtype: str, use_cuda: bool) -> str:
    """The name of the dtype to compute in. Raises ValueError for one that the device doesn't compute in."""
    choices = ("bfloat16", "float16") if use_cuda else ("float32",)
    if dtype == "auto":
        return checkpoint_dtype if checkpoint_dtype in choices else choices[0]
    if dtype not in choices:
        raise ValueError(
            f"dtype must be {' or '.join(choices)}, or auto, on {'a GPU' if use_cuda else 'the CPU'}; got {dtype!r}"
        )
    return dtype


def open_backend(use_cuda: bool, dtype: str) -> Backend:
    if use_cuda:
        from ml_dtypes import bfloat16

        from cupaged.backends.cuda import open_cuda

        return open_cuda(np.dtype({"bfloat16": bfloat16, "float16": np.float16}[dtype]))
    from cupaged.backends.reference import ReferenceBackend

    return ReferenceBackend()
