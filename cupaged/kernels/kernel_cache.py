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


class KernelFolder:
    """key -> (path of the image, the kernel's symbol). Threads and processes may share one folder."""

    def __init__(self, path: Path):
        self.path = path

    def find(self, key: str) -> tuple[Path, str] | None:
        """The entry, if it is there and undamaged."""
        try:
            digest, symbol = (self.path / f"{key}.symbol").read_text().split()
            image = (self.path / key).read_bytes()
        except (OSError, ValueError):
            return None
        return (self.path / key, symbol) if hashlib.sha256(image).hexdigest() == digest else None

    def store(self, key: str, image: bytes, symbol: str) -> tuple[Path, str]:
        """Keep an entry; returns what find would. Raises OSError."""
        self.path.mkdir(parents=True, exist_ok=True)
        _write_atomically(self.path / key, image)
        _write_atomically(self.path / f"{key}.symbol", f"{hashlib.sha256(image).hexdigest()} {symbol}\n".encode())
        return self.path / key, symbol


class KernelCache:
    """A KernelFolder; when it can't be written (a read-only home, a full disk), entries go to a temporary one that
    lives as long as the cache object."""

    def __init__(self, path: Path):
        self._folders = [KernelFolder(path)]
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._lock = threading.Lock()

    def find(self, key: str) -> tuple[Path, str] | None:
        """The entry, if it is there and undamaged."""
        return next(filter(None, (folder.find(key) for folder in self._folders)), None)

    def store(self, key: str, image: bytes, symbol: str) -> tuple[Path, str]:
        """Keep an entry; returns what find would."""
        try:
            return self._folders[0].store(key, image, symbol)
        except OSError as error:
            return self._temporary_folder(error).store(key, image, symbol)

    def _temporary_folder(self, error: OSError) -> KernelFolder:
        with self._lock:
            if self._temporary is None:
                logger.warning(
                    "kernel cache: can't write to %s (%s); every process will compile its kernels again."
                    " Set CUPAGED_HOME to a folder that can be written.",
                    self._folders[0].path,
                    error.strerror,
                )
                self._temporary = tempfile.TemporaryDirectory(prefix="cupaged-kernels-")
                self._folders.append(KernelFolder(Path(self._temporary.name)))
            return self._folders[1]


def _write_atomically(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
