"""Checks of what a caller gives: a wrong value becomes one line that names the argument and what it may be."""

from __future__ import annotations

import math


def require(holds: bool, name: str, value, what: str) -> None:
    """Raise ValueError "<name> must be <what>; got <value>" unless `holds`."""
    if not holds:
        raise ValueError(f"{name} must be {what}; got {value!r}")


def is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
