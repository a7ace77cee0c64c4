"""Which kernels a GPU gets: the portable ones, or where there are any, those written for its architecture.

Sources named *_sm90.cu are written for Hopper (sm_90a): warpgroup products, barriers in shared memory.
"""

from __future__ import annotations

import os

from cupaged.kernels.device import device_info

ENVIRONMENT_VARIABLE = "CUPAGED_TIER"
TIERS = ("portable", "sm90")
SM90_SUFFIX = "_sm90.cu"


def runs_on(file: str, arch: str) -> bool:
    """Whether a source of cuda_src compiles for the architecture (NVRTC's spelling, "sm_90a")."""
    return not file.endswith(SM90_SUFFIX) or arch == "sm_90a"


def use_sm90() -> bool:
    """Whether Hopper's own kernels take the portable ones' place on the current device: where it is one, unless
    CUPAGED_TIER=portable asks for the others.

    Raises ValueError for another value, and for CUPAGED_TIER=sm90 where the device is no Hopper."""
    is_hopper = device_info().arch == "sm_90a"
    tier = os.environ.get(ENVIRONMENT_VARIABLE)
    if tier is None:
        return is_hopper
    if tier not in TIERS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected {' or '.join(TIERS)}, got {tier!r}")
    if tier == "sm90" and not is_hopper:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}=sm90 needs a Hopper GPU, this one is {device_info().arch}: unset it")
    return tier == "sm90"
