"""Compiled kernels on disk.

An entry is two files named by its key: the image (a cubin or PTX), and `<key>.symbol` with the image's SHA-256 and the
kernel's mangled name. Each appears by rename, so that it is whole or absent whatever is killed when; an image that
doesn't match its digest counts as absent and is replaced.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
from pathlib import Path

logger = logging.getLogger(__name__)


class KernelCache:
    """key -> (path of the image, the kernel's symbol). Threads and processes may share one folder.

    When the folder can't be written (a read-only home, a full disk), entries go to a temporary folder that lives as
    long as the cache object.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._lock = threading.Lock()

    def find(self, key: str) -> tuple[Path, str] | None:
        """The entry, if it is there and undamaged."""
        for folder in [self.folder] + ([Path(self._temporary.name)] if self._temporary else []):
            try:
                digest, symbol = (folder / f"{key}.symbol").read_text().split()
                image = (folder / key).read_bytes()
            except (OSError, ValueError):
                continue
            if hashlib.sha256(image).hexdigest() == digest:
                return folder / key, symbol
        return None

    def store(self, key: str, image: bytes, symbol: str) -> tuple[Path, str]:
        """Keep an entry; returns what find would."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return _write_entry(self.folder, key, image, symbol)
        except OSError as error:
            return _write_entry(self._temporary_folder(error), key, image, symbol)

    def _temporary_folder(self, error: OSError) -> Path:
        with self._lock:
            if self._temporary is None:
                logger.warning(
                    "kernel cache: can't write to %s (%s); every process will compile its kernels again."
                    " Set CUPAGED_HOME to a folder that can be written.",
                    self.folder,
                    error.strerror,
                )
                self._temporary = tempfile.TemporaryDirectory(prefix="cupaged-kernels-")
            return Path(self._temporary.name)


def _write_entry(folder: Path, key: str, image: bytes, symbol: str) -> tuple[Path, str]:
    _write_atomically(folder / key, image)
    _write_atomically(folder / f"{key}.symbol", f"{hashlib.sha256(image).hexdigest()} {symbol}\n".encode())
    return folder / key, symbol


def _write_atomically(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
