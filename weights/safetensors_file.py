"""The safetensors format: a header that says where each tensor lies, checked before a byte of it is believed.

8 bytes   N, the header's length, little-endian
N bytes   JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
the rest  the tensors, row-major, with neither holes nor overlaps; offsets count from here
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cupaged.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BOOL": np.dtype(np.bool_),
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)},
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def open_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The file's tensors, mapped and read-only: nothing but the header is read until they are touched.

    Raises CheckpointError that says what is wrong with the file.
    """
    header, data_start, data_size = _read_header(path)
    spans = {name: _span(path, name, entry) for name, entry in header.items() if name != "__metadata__"}
    _check_that_spans_tile(path, spans, data_size)
    if not data_size:
        return {name: np.empty(shape, dtype) for name, (dtype, shape, _, _) in spans.items()}
    data = np.memmap(path, mode="r", offset=data_start, shape=(data_size,), dtype=np.uint8)
    return {name: data[begin:end].view(dtype).reshape(shape) for name, (dtype, shape, begin, end) in spans.items()}


def write_safetensors(path: Path, tensors: Mapping[str, Any], dtype: np.dtype) -> None:
    """Write tensors (anything with a shape and slices of rows) converted to dtype, one piece after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers wants to know the framework
    offset = 0
    for name, tensor in tensors.items():
        end = offset + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for rows in row_chunks(tensor.shape):
                file.write(np.ascontiguousarray(tensor[rows].astype(dtype)).view(np.uint8).data)


def row_chunks(shape: tuple[int, ...], max_elements: int = 1 << 24) -> Iterable[slice]:
    """Slices of the first axis that hold at most max_elements elements each, but at least one row."""
    step = max(1, max_elements // max(1, math.prod(shape[1:])))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(header, where the tensors start, how many bytes of them the file holds)."""
    try:
        with open(path, "rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _broken(path, f"truncated: it has {file_size} bytes, too few for a header")
            (header_size,) = struct.unpack("<Q", prefix)
            if header_size > MAX_HEADER_BYTES:
                raise _broken(path, f"its header claims {header_size} bytes, more than the format's {MAX_HEADER_BYTES}")
            if 8 + header_size > file_size:
                raise _broken(path, f"truncated: its header needs {8 + header_size} bytes, it has {file_size}")
            text = file.read(header_size)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from None
    try:
        header = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    return header, 8 + header_size, file_size - 8 - header_size


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return result


def _span(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of one header entry; sizes agree, but not yet that the span lies in the file."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _broken(path, f"tensor {name}: its entry lacks dtype, shape or data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise _broken(path, f"tensor {name}: unknown dtype {entry['dtype']!r}")
    dtype, shape, offsets = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _broken(path, f"tensor {name}: shape {shape!r} or data_offsets {offsets!r} are not lists of sizes")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise _broken(
            path,
            f"tensor {name}: shape {shape} in {entry['dtype']} takes {math.prod(shape) * dtype.itemsize} bytes,"
            f" its data_offsets {offsets} span {end - begin}",
        )
    return dtype, tuple(shape), begin, end


def _check_that_spans_tile(path: Path, spans: dict[str, tuple], data_size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    expected, before = 0, "the header"
    for name, (_, _, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin < expected:
            raise _broken(path, f"tensors {before} and {name} overlap")
        if begin > expected:
            raise _broken(path, f"{begin - expected} bytes before tensor {name} belong to no tensor")
        if end > data_size:
            raise _broken(path, f"truncated: tensor {name} ends at byte {end} of the data, the file has {data_size}")
        expected, before = end, name
    if expected < data_size:
        raise _broken(path, f"{data_size - expected} bytes at its end belong to no tensor")


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in values
    )


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged safetensors file: {what}; fetch it again")
