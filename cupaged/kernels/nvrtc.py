"""CuPy's binding of NVRTC, loaded when it is first needed. It needs no driver and no GPU."""

from __future__ import annotations

import functools

from cupaged.errors import DeviceError


@functools.cache
def load_nvrtc():
    """The module cupy_backends.cuda.libs.nvrtc, with the library behind it. Raises DeviceError without one."""
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        raise DeviceError("NVRTC can't be loaded; pip install nvidia-cuda-nvrtc-cu12") from error
    return nvrtc
