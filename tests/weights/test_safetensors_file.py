"""Reading safetensors: what the library writes is read back, and no damage gets past the header."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cupaged.errors import CheckpointError
from cupaged.weights.safetensors_file import open_safetensors, row_chunks, write_safetensors


def write(path, header, data=b"", header_size=None):
    """A file with this header, text or object, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if header_size is None else header_size) + text + data)
    return path


def entry(begin, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8])
def test_what_the_library_wrote_is_read_back(path, dtype):
    rng = np.random.default_rng(0)
    tensors = {
        "matrix": rng.integers(0, 100, (3, 5)).astype(dtype),
        "vector": rng.integers(0, 100, 7).astype(dtype),
        "scalar": np.array(3, dtype),
        "empty": np.empty((0, 4), dtype),
    }
    save_file(tensors, path, metadata={"format": "np"})
    read = open_safetensors(path)
    assert read.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert read[name].dtype == expected.dtype
        np.testing.assert_array_equal(read[name], expected)


def test_tensors_are_mapped_and_read_only(path):
    save_file({"a": np.ones((4, 4), np.float32)}, path)
    tensor = open_safetensors(path)["a"]
    assert not tensor.flags.owndata
    assert not tensor.flags.writeable


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_written_the_library_reads(path, dtype):
    rng = np.random.default_rng(0)
    tensors = {"b": rng.standard_normal((33, 17)), "a": rng.standard_normal(5)}
    write_safetensors(path, tensors, np.dtype(dtype))
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(read[name], value.astype(dtype))


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (8, 4), (1, 100), (9,)])
def test_row_chunks_cover_all_rows_once(shape):
    chunks = list(row_chunks(shape, max_elements=8))
    assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(shape[0]))
    columns = int(np.prod(shape[1:]))
    for chunk in chunks:
        assert (chunk.stop - chunk.start) * columns <= 8 or chunk.stop - chunk.start == 1


def test_every_truncation_is_noticed(path):
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(2, np.float16)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"x\.safetensors: damaged safetensors file: .*truncated"):
            open_safetensors(path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "tensors a and b overlap"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "tensors a and b overlap"),
        ({"a": entry(0, 8)}, 4, "truncated: tensor a ends at byte 8"),
        ({"a": entry(2**62, 2**62 + 8)}, 8, "belong to no tensor"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "4 bytes before tensor b belong to no tensor"),
        ({"a": entry(0, 4)}, 9, "5 bytes at its end belong to no tensor"),
        ({"a": entry(8, 0, shape=[2])}, 8, "tensor a: shape .* span -8"),
        ({"a": entry(-8, 0, shape=[2])}, 8, "tensor a: .* not lists of sizes"),
        ({"a": entry(0, 8, shape=[3])}, 8, "takes 12 bytes, its data_offsets .* span 8"),
        ({"a": entry(0, 8, shape=[2**40, 2**40])}, 8, "takes"),
        ({"a": entry(0, 8, shape=[-1, -2])}, 8, "not lists of sizes"),
        ({"a": entry(0, 8, shape=[2.0])}, 8, "not lists of sizes"),
        ({"a": entry(0, 8, shape="2")}, 8, "not lists of sizes"),
        ({"a": entry(0, 8, dtype="F31")}, 8, "tensor a: unknown dtype 'F31'"),
        ({"a": entry(0, 8, dtype=["F32"])}, 8, "unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "lacks dtype, shape or data_offsets"),
        ({"a": [0, 8]}, 8, "lacks dtype, shape or data_offsets"),
        ({"a": {**entry(0, 8), "data_offsets": [0, 4, 8]}}, 8, "not lists of sizes"),
        (b'{"a": 1, "a": 2}', 0, "'a' stands there twice"),
        (b'{"a": ', 0, "not valid JSON"),
        (b"\xff\xfe", 0, "not valid JSON"),
        (b"[" * 100_000, 0, "not valid JSON"),
        ([], 0, "not a JSON object"),
    ],
)
def test_damage_is_named(path, header, data, message):
    write(path, header, b"\0" * data)
    with pytest.raises(CheckpointError, match=message) as error:
        open_safetensors(path)
    assert "\n" not in str(error.value)


def test_a_header_longer_than_the_format_allows_is_not_read(path):
    write(path, {}, header_size=2**63)
    with pytest.raises(CheckpointError, match="its header claims 9223372036854775808 bytes"):
        open_safetensors(path)


def test_a_missing_file_is_named(path):
    with pytest.raises(CheckpointError, match="can't be read: No such file"):
        open_safetensors(path)
