"""What the launchers know of the GPU they launch on."""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass

from cupaged.errors import DeviceError
from cupaged.kernels.nvrtc import load_nvrtc

MIN_COMPUTE_CAPABILITY = 80


@dataclass(frozen=True)
class DeviceInfo:
    """Facts that tile choices depend on."""

    arch: str  # NVRTC's spelling, "sm_90a"
    num_sms: int
    max_shared_bytes: int  # dynamic shared memory a thread block may have at most


def device_info() -> DeviceInfo:
    """The current CuPy device's facts, or what set_device_info gave."""
    return _override or _query_device()


def set_device_info(info: DeviceInfo | None) -> None:
    """Stand in for the device (None: no longer), so that launchers and tile choices run where there is none."""
    global _override
    _override = info


_override: DeviceInfo | None = None


@functools.cache
def _query_device() -> DeviceInfo:
    import cupy

    device = cupy.cuda.Device()
    attributes = device.attributes
    return DeviceInfo(
        arch=choose_arch(int(device.compute_capability), load_nvrtc().getSupportedArchs()),
        num_sms=attributes["MultiProcessorCount"],
        max_shared_bytes=attributes["MaxSharedMemoryPerBlockOptin"],
    )


def choose_arch(compute_capability: int, supported: Collection[int]) -> str:
    """NVRTC's -arch for a GPU of this compute capability (90 for 9.0), given the ones that this NVRTC knows.

    sm_90 gets its "a" variant, which has wgmma. A GPU newer than NVRTC gets the nearest older cubin of its own
    generation, else the newest PTX ("compute_.."), which the driver finishes. Raises DeviceError below 8.0.
    """
    if compute_capability < MIN_COMPUTE_CAPABILITY:
        major, minor = divmod(compute_capability, 10)
        raise DeviceError(f"the GPU's compute capability is {major}.{minor}; the kernels need 8.0 (Ampere) or newer")
    nearest = max(cc for cc in supported if cc <= compute_capability)
    if nearest // 10 != compute_capability // 10:
        return f"compute_{nearest}"
    return "sm_90a" if nearest == 90 else f"sm_{nearest}"
