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
    """Whether Hopper's own kernels take the portable ones' place on the current device: when CUPAGED_TIER=sm90 asks
    for them. They have not run on a GPU yet; until they have, the portable ones are the default.

    Raises ValueError for another value, and where the device is no Hopper."""
    tier = os.environ.get(ENVIRONMENT_VARIABLE, "portable")
    if tier not in TIERS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected {' or '.join(TIERS)}, got {tier!r}")
    if tier == "portable":
        return False
    if (arch := device_info().arch) != "sm_90a":
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={tier} needs a Hopper GPU, this one is {arch}: unset it")
    return True
