"""GGUF files give the tensors, the config and the errors of the model they were made from."""

import struct

import gguf
import numpy as np
import pytest
from checkpoint_files import CONFIG, HostBackend, permuted, quantized, random_tensors, write_gguf

from cupaged.config import ModelConfig, RopeConfig
from cupaged.errors import CheckpointError
from cupaged.weights.checkpoint import Checkpoint
from cupaged.weights.gguf_file import GGUFFile
from cupaged.weights.packing import load_weights

QUANTISED = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def whole(tensor):
    return np.asarray(tensor[0 : tensor.shape[0]])


@pytest.mark.parametrize("matrix_type", ["F32", "F16", "BF16"])
def test_plain_types_are_read_exactly(path, tensors, matrix_type):
    read = Checkpoint(write_gguf(path, tensors, matrix_type=matrix_type)).tensors
    assert read.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert read[name].shape == expected.shape
        np.testing.assert_array_equal(whole(read[name]).astype(np.float32), expected, err_msg=name)


@pytest.mark.parametrize("matrix_type", QUANTISED)
def test_quantised_types_are_read_as_the_library_does(path, tensors, matrix_type):
    read = Checkpoint(write_gguf(path, tensors, matrix_type=matrix_type)).tensors
    kind = gguf.GGMLQuantizationType[matrix_type]
    heads = {"q_proj": CONFIG["num_attention_heads"], "k_proj": CONFIG["num_key_value_heads"]}
    for name, value in tensors.items():
        if value.ndim == 1:
            np.testing.assert_array_equal(whole(read[name]), value)
            continue
        num_heads = next((n for part, n in heads.items() if part in name), None)
        stored = value if num_heads is None else permuted(value, num_heads)
        expected = gguf.quants.dequantize(quantized(stored, kind), kind)
        assert 0.01 < np.abs(expected).mean() < 100
        if num_heads is not None:  # interleaved halves, taken apart again
            pairs = expected.reshape(num_heads, 32, 2, -1)
            expected = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(value.shape)
        np.testing.assert_array_equal(whole(read[name]), expected, err_msg=name)


@pytest.mark.parametrize("matrix_type", ["F16", "Q8_0"])
def test_slices_of_rows_are_those_rows(path, tensors, matrix_type):
    read = Checkpoint(write_gguf(path, tensors, matrix_type=matrix_type)).tensors
    for tensor in read.values():
        together = np.concatenate([tensor[i : min(i + 7, tensor.shape[0])] for i in range(0, tensor.shape[0], 7)])
        np.testing.assert_array_equal(together, whole(tensor))


def test_weights_load_from_a_gguf_file(path, tensors):
    checkpoint = Checkpoint(write_gguf(path, tensors, matrix_type="F16"))
    ours = load_weights(checkpoint.tensors, checkpoint.config, HostBackend())
    expected = load_weights(tensors, ModelConfig.from_hf(CONFIG), HostBackend())
    for mine, theirs in zip(ours.layers, expected.layers, strict=True):
        np.testing.assert_array_equal(mine.qkv, theirs.qkv)
        np.testing.assert_array_equal(mine.gate_up, theirs.gate_up)


def test_the_config_is_that_of_the_directory(path, tensors):
    config = Checkpoint(write_gguf(path, tensors)).config
    assert config == ModelConfig.from_hf(CONFIG)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_qwen_is_not_permuted(path, arch):
    config = {**CONFIG, "architectures": [arch.capitalize() + "ForCausalLM"], "tie_word_embeddings": False}
    tensors = random_tensors(config)
    metadata = {f"{arch}.attention.key_length": 64}
    checkpoint = Checkpoint(write_gguf(path, tensors, config, arch=arch, metadata=metadata))
    assert checkpoint.config == ModelConfig.from_hf(config)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        np.testing.assert_array_equal(whole(checkpoint.tensors[name]), expected, err_msg=name)


def rope_of(path, tensors, **metadata):
    return Checkpoint(write_gguf(path, tensors, metadata={f"llama.{k}": v for k, v in metadata.items()})).config.rope


def test_linear_and_yarn_scaling(path, tensors):
    linear = rope_of(path, tensors, **{"rope.scaling.type": "linear", "rope.scaling.factor": 2.5})
    assert linear == RopeConfig("linear", 10000.0, 2.5)
    yarn = rope_of(
        path,
        tensors,
        **{
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.yarn_beta_fast": 16.0,
        },
    )
    assert yarn == RopeConfig("yarn", 10000.0, 4.0, original_max_position_embeddings=32, beta_fast=16.0)


def llama3_divisors(factor, low=1.0, high=4.0, original=8192, theta=500000.0, dim=64):
    """By the published rule: short waves stay, long ones are divided, those between are blended."""
    result = []
    for i in range(dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * i / dim)
        if wavelength < original / high:
            result.append(1.0)
        elif wavelength > original / low:
            result.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised_by_its_divisors(path, tensors, factor):
    tensors["rope_freqs.weight"] = llama3_divisors(factor)
    checkpoint = Checkpoint(write_gguf(path, tensors, {**CONFIG, "rope_theta": 500000.0}))
    load_weights(checkpoint.tensors, checkpoint.config, HostBackend())  # the divisors are no unknown tensor
    assert checkpoint.config.rope == RopeConfig(
        "llama3", 500000.0, factor, 1.0, 4.0, original_max_position_embeddings=8192
    )


def test_other_divisors_are_refused(path, tensors):
    tensors["rope_freqs.weight"] = llama3_divisors(8.0, high=8.0)
    write_gguf(path, tensors, {**CONFIG, "rope_theta": 500000.0})
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not Llama 3's"):
        Checkpoint(path)


def test_a_tensor_of_another_architecture_is_named(path, tensors):
    checkpoint = Checkpoint(write_gguf(path, {**tensors, "blk.0.attn_sub_norm.weight": np.ones(256, np.float32)}))
    with pytest.raises(CheckpointError, match=r"unknown tensors: blk\.0\.attn_sub_norm\.weight"):
        load_weights(checkpoint.tensors, checkpoint.config, HostBackend())


@pytest.mark.parametrize(
    ("arch", "metadata", "message"),
    [
        ("gemma", {}, "GGUF architecture 'gemma' is not supported"),
        ("llama", {"llama.expert_count": 8}, "mixture-of-experts"),
        ("llama", {"split.count": 3}, "one of 3 parts"),
        ("llama", {"tokenizer.ggml.eos_token_id": "x"}, "eos_token_id has the wrong type"),
        ("llama", {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "rope type 'longrope'"),
        ("llama", {"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.factor is missing"),
        ("llama", {"llama.attention.key_length": "64"}, "key_length has the wrong type"),
    ],
)
def test_what_is_not_run_is_named(path, tensors, arch, metadata, message):
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(write_gguf(path, tensors, arch=arch, metadata=metadata))


def test_a_missing_tensor_is_named(path, tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]
    checkpoint = Checkpoint(write_gguf(path, tensors))
    with pytest.raises(CheckpointError, match=r"missing tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_weights(checkpoint.tensors, checkpoint.config, HostBackend())


def test_the_ends_of_turns_end_an_output(path, tensors):
    ends = {"tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eom_token_id": 7}
    files = Checkpoint(write_gguf(path, tensors, metadata=ends)).files
    assert (files.config["eos_token_id"], files.generation_config["eos_token_id"]) == (7, [7, 9])


class TestContainer:
    """The container's own checks, on a small file that the library wrote."""

    @pytest.fixture
    def small(self, path):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint8("a.u8", 200)
        writer.add_int64("a.i64", -5)
        writer.add_float64("a.f64", 0.1)
        writer.add_bool("a.bool", True)
        writer.add_string("a.text", "é…")
        writer.add_array("a.ints", [1, -2, 3])
        writer.add_array("a.texts", ["x", "", "yz"])
        writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
        writer.add_tensor("v", np.arange(4, dtype=np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def test_metadata_and_tensors(self, small):
        file = GGUFFile(small)
        expected = {"u8": 200, "i64": -5, "f64": 0.1, "bool": True, "text": "é…", "ints": [1, -2, 3]}
        assert {key: file.metadata["a." + key] for key in expected} == expected
        assert file.metadata["a.texts"] == ["x", "", "yz"]
        np.testing.assert_array_equal(whole(file.tensors["t"]), [[0, 1, 2], [3, 4, 5]])
        np.testing.assert_array_equal(whole(file.tensors["v"]), [0, 1, 2, 3])

    def test_every_truncation_is_noticed(self, small):
        data = small.read_bytes().rstrip(b"\0")  # the last tensor's padding may go
        used = GGUFFile(small).tensors["v"]
        assert used.shape == (4,)
        for size in range(len(data)):
            small.write_bytes(data[:size])
            with pytest.raises(CheckpointError, match=r"truncated|it is empty|not a GGUF file"):
                GGUFFile(small)

    @pytest.mark.parametrize(
        ("at", "data", "message"),
        [
            (0, b"GGML", r"not a GGUF file: it starts with b'GGML'"),
            (4, struct.pack("<I", 1), "GGUF version 1 can't be read"),
            (4, struct.pack(">I", 3), "GGUF big-endian files can't be read"),
            (8, struct.pack("<Q", 2**63), "damaged GGUF file"),
            (16, struct.pack("<Q", 2**63), "damaged GGUF file"),
            (24, struct.pack("<Q", 2**63), "truncated"),
        ],
    )
    def test_a_damaged_start(self, small, at, data, message):
        content = bytearray(small.read_bytes())
        content[at : at + len(data)] = data
        small.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            GGUFFile(small)

    def test_any_byte_may_be_wrong(self, small):
        """No damage gets through as another kind of exception."""
        content = small.read_bytes()
        refused = 0
        for at in range(len(content) - 32):
            small.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
            try:
                for tensor in GGUFFile(small).tensors.values():
                    tensor[0 : tensor.shape[0]]
            except CheckpointError as error:
                assert "\n" not in str(error)  # noqa: PT017
                refused += 1
        assert refused > 100

    def test_a_tensor_past_the_end(self, small):
        content = small.read_bytes()
        small.write_bytes(content.replace(struct.pack("<QQIQ", 3, 2, 0, 0), struct.pack("<QQIQ", 3, 2, 0, 2**40)))
        with pytest.raises(CheckpointError, match="truncated: tensor t ends at byte"):
            GGUFFile(small)

    def test_an_unreadable_type_is_named(self, small):
        content = small.read_bytes()
        small.write_bytes(content.replace(struct.pack("<QQIQ", 3, 2, 0, 0), struct.pack("<QQIQ", 3, 2, 16, 0)))
        with pytest.raises(CheckpointError, match="tensor t has ggml type 16, which can't be read"):
            GGUFFile(small)
