"""What the launchers know of the GPU they launch on."""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass

from cupaged.errors import DeviceError
from cupaged.kernels.nvrtc import load_nvrtc
from cupaged.kernels.prebuilt import prebuilt_archs

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
        arch=find_arch(int(device.compute_capability)),
        num_sms=attributes["MultiProcessorCount"],
        max_shared_bytes=attributes["MaxSharedMemoryPerBlockOptin"],
    )


def find_arch(compute_capability: int) -> str:
    """Whose kernels to take for a GPU of this compute capability (90 for 9.0): those that were built ahead, if they run
    there, or else NVRTC's. A GPU of a generation that NVRTC doesn't know gets its newest PTX ("compute_.."), which the
    driver finishes. Raises DeviceError when there are neither, and below 8.0.
    """
    if compute_capability < MIN_COMPUTE_CAPABILITY:
        major, minor = divmod(compute_capability, 10)
        raise DeviceError(f"the GPU's compute capability is {major}.{minor}; the kernels need 8.0 (Ampere) or newer")
    archs = prebuilt_archs()
    if (arch := choose_arch(compute_capability, archs)) is not None:
        return arch
    try:
        compiled = compiled_archs()
    except DeviceError as error:
        built = f"kernels were built ahead for {', '.join(archs)} only, and " if archs else ""
        raise DeviceError(f"{built}{error}") from None
    if (arch := choose_arch(compute_capability, compiled)) is not None:
        return arch
    return f"compute_{max(cc for cc in map(_capability, compiled) if cc < compute_capability)}"


def compiled_archs() -> list[str]:
    """NVRTC's -arch for each kind of GPU that it knows and the kernels run on, the oldest first. Raises DeviceError.

    sm_90 is there as its "a" variant, which has wgmma.
    """
    capabilities = sorted(cc for cc in load_nvrtc().getSupportedArchs() if cc >= MIN_COMPUTE_CAPABILITY)
    return ["sm_90a" if cc == 90 else f"sm_{cc}" for cc in capabilities]


def choose_arch(compute_capability: int, archs: Collection[str]) -> str | None:
    """The one whose cubins run best on a GPU of this compute capability: its own, or the nearest older one of its
    generation ("a" variants run on their own kind only)."""
    usable = [
        arch
        for arch in archs
        if (cc := _capability(arch)) == compute_capability
        or (cc < compute_capability and cc // 10 == compute_capability // 10 and not arch.endswith("a"))
    ]
    return max(usable, key=_capability, default=None)


def _capability(arch: str) -> int:
    return int(arch.removeprefix("sm_").removesuffix("a"))
