"""What the launchers know of the GPU they launch on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceInfo:
    """Facts that tile choices depend on."""

    arch: str  # NVRTC's spelling, "sm_90a"
    num_sms: int
    max_shared_bytes: int  # dynamic shared memory a thread block may have at most
