"""The GGUF container: metadata and a table of tensors, checked, then mapped.

The `gguf` library's reader makes an array object of every string, which takes seconds for a vocabulary and can't
tell a truncated file from a bug; this one reads the same in a fraction of a second. Dequantising is the library's.

    magic "GGUF", version, number of tensors, number of metadata entries
    metadata: key, type, value                            strings are a uint64 length and UTF-8 bytes
    tensors:  name, dimensions (innermost first), type, offset
    padding to general.alignment; then the tensors, their offsets counted from here
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cupaged.errors import CheckpointError

# ggml's number of a type -> its name, values a block, bytes a block
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
_PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of the file; rows are dequantised when they are asked for.

    data: [rows, bytes a row] uint8, mapped; a vector is one row.
    row_order: which stored row (element, for a vector) is row i; None: row i itself.
    """

    shape: tuple[int, ...]
    type_name: str
    data: np.ndarray
    row_order: np.ndarray | None = None

    def __getitem__(self, rows: slice) -> np.ndarray:
        """These rows as float32, or as they are stored if that is no quantised type."""
        order = rows if self.row_order is None else self.row_order[rows]
        if len(self.shape) == 1:
            return self._values(self.data)[0][order]
        return self._values(self.data[order]).reshape(-1, *self.shape[1:])

    def _values(self, data: np.ndarray) -> np.ndarray:
        if self.type_name in _PLAIN:
            return data.view(_PLAIN[self.type_name])
        import gguf  # takes a while to import, so not before a quantised tensor is read

        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[self.type_name])


class GGUFFile:
    """metadata: key -> int, float, bool, str or a list of them; tensors: name -> GGUFTensor.

    Raises CheckpointError when the file is no GGUF file, is damaged or holds a tensor type that can't be read.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self._buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise self._broken("it is empty") from None
        except OSError as error:
            raise CheckpointError(f"{path}: can't be read: {error.strerror}") from None
        self._at = 0
        try:
            num_tensors, num_entries = self._read_start()
            self.metadata: dict[str, Any] = {}
            for _ in range(num_entries):
                key = self._string()
                self.metadata[key] = self._value(self._scalar("I"))
            table = [self._tensor_entry() for _ in range(num_tensors)]
        except (struct.error, _PastEndError, RecursionError):
            raise self._broken(f"truncated: its header goes on past its {len(self._buffer)} bytes") from None
        except UnicodeDecodeError:
            raise self._broken("a string in its header is not UTF-8") from None
        self.tensors = self._map(table)

    def _read_start(self) -> tuple[int, int]:
        if self._buffer[:4] != b"GGUF":
            raise CheckpointError(f"{self.path}: not a GGUF file: it starts with {self._buffer[:4]!r}, not b'GGUF'")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            big_endian = version in (2 << 24, 3 << 24)
            what = "big-endian files" if big_endian else f"version {version}"
            raise CheckpointError(f"{self.path}: GGUF {what} can't be read; little-endian versions 2 and 3 can")
        return self._scalar("Q"), self._scalar("Q")

    def _scalar(self, code: str):
        (value,) = struct.unpack_from("<" + code, self._buffer, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        return self._take(self._scalar("Q")).decode()

    def _take(self, size: int) -> bytes:
        if self._at + size > len(self._buffer):
            raise _PastEndError
        self._at += size
        return self._buffer[self._at - size : self._at]

    def _value(self, kind: int):
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            kind, count = self._scalar("I"), self._scalar("Q")
            if kind in _SCALARS:
                code = f"<{count}{_SCALARS[kind]}"
                return list(struct.unpack(code, self._take(count * struct.calcsize("<" + _SCALARS[kind]))))
            return [self._value(kind) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._broken(f"metadata type {kind} does not exist")
        return self._scalar(_SCALARS[kind])

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dimensions = self._string(), self._scalar("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self._broken(f"tensor {name} has {num_dimensions} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(num_dimensions))[::-1]
        if not all(shape):
            raise self._broken(f"tensor {name} has shape {shape}")
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _map(self, table: list[tuple[str, tuple[int, ...], int, int]]) -> dict[str, GGUFTensor]:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._broken(f"general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, type_number, offset in table:
            if name in tensors:
                raise self._broken(f"tensor {name} stands there twice")
            if type_number not in TENSOR_TYPES:
                known = ", ".join(type_name for type_name, _, _ in TENSOR_TYPES.values())
                raise CheckpointError(
                    f"{self.path}: tensor {name} has ggml type {type_number}, which can't be read; these can: {known}"
                )
            type_name, block, block_bytes = TENSOR_TYPES[type_number]
            if shape[-1] % block:
                raise self._broken(f"tensor {name}: rows of {shape[-1]} values are no whole {type_name} blocks")
            num_rows, row_bytes = math.prod(shape[:-1]), shape[-1] // block * block_bytes
            if start + offset + num_rows * row_bytes > len(self._buffer):
                raise self._broken(
                    f"truncated: tensor {name} ends at byte {start + offset + num_rows * row_bytes},"
                    f" the file has {len(self._buffer)}"
                )
            data = np.frombuffer(self._buffer, np.uint8, num_rows * row_bytes, start + offset)
            tensors[name] = GGUFTensor(shape, type_name, data.reshape(num_rows, row_bytes))
        return tensors

    def _broken(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: damaged GGUF file: {what}; fetch it again")


class _PastEndError(Exception):
    """A length in the header leads past the end of the file."""
