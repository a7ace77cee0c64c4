"""Where cupaged keeps what it fetched or built."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$CUPAGED_HOME, else $XDG_CACHE_HOME/cupaged, else ~/.cache/cupaged. It need not exist yet."""
    if home := os.environ.get("CUPAGED_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cupaged"
