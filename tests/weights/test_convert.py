"""`convert`: what it writes is the model of the GGUF file; it appears whole or not at all. And the real model."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import write_gguf
from safetensors.numpy import load_file

from cupaged.errors import CheckpointError, ModelNotFoundError
from cupaged.weights import convert as convert_module
from cupaged.weights.checkpoint import Checkpoint
from cupaged.weights.convert import convert

TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "ab"]


def add_tokenizer(writer):
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0, 0.0, 0.0, -1.0, -2.0, -3.0])
    writer.add_token_types([2, 3, 3, 1, 1, 1])
    writer.add_add_space_prefix(False)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}")


@pytest.fixture
def gguf_path(tmp_path, tensors):
    return write_gguf(tmp_path / "model.gguf", tensors, matrix_type="F16", tokenizer=add_tokenizer)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_directory_is_the_same_model(gguf_path, tmp_path, tensors, dtype):
    out = tmp_path / "deep" / "out"
    convert(gguf_path, out, dtype=dtype)
    written = load_file(out / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert written[name].dtype == np.dtype(dtype)
        np.testing.assert_array_equal(written[name].astype(np.float32), expected)

    before, after = Checkpoint(gguf_path), Checkpoint(out)
    assert after.config.dtype == dtype
    assert (after.config.vocab_size, after.config.rope) == (before.config.vocab_size, before.config.rope)
    assert after.eos_token_ids == before.eos_token_ids == (2,)
    assert after.tokenizer.encode("ab") == before.tokenizer.encode("ab") == [1, 5]
    messages = [{"role": "user", "content": "ba"}]
    assert after.tokenizer.chat(messages) == before.tokenizer.chat(messages) == [1, 4, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "deep"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_rounding_is_to_nearest(gguf_path, tmp_path, tensors):
    tensors["model.norm.weight"] = np.linspace(-3, 3, 256, dtype=np.float32)
    path = write_gguf(tmp_path / "odd.gguf", tensors, tokenizer=add_tokenizer)
    convert(path, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    np.testing.assert_array_equal(written, tensors["model.norm.weight"].astype(ml_dtypes.bfloat16))


def test_an_empty_directory_is_filled_and_another_one_left_alone(gguf_path, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    convert(gguf_path, out)
    with pytest.raises(ValueError, match=r"OUT_DIR .*out exists already"):
        convert(gguf_path, out)
    with pytest.raises(ValueError, match="exists already"):
        convert(gguf_path, gguf_path)


def test_a_failure_leaves_nothing(gguf_path, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_module, "write_safetensors", full_disk)
    with pytest.raises(CheckpointError, match="out: can't be written: No space left on device"):
        convert(gguf_path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_wrong_arguments(gguf_path, tmp_path, tensors):
    with pytest.raises(ValueError, match="dtype must be one of bfloat16"):
        convert(gguf_path, tmp_path / "out", dtype="int8")
    with pytest.raises(ModelNotFoundError, match="no such file"):
        convert(tmp_path / "none.gguf", tmp_path / "out")
    with pytest.raises(ModelNotFoundError, match="a directory, not a GGUF file"):
        convert(tmp_path, tmp_path / "out")
    del tensors["model.norm.weight"]
    incomplete = write_gguf(tmp_path / "incomplete.gguf", tensors, tokenizer=add_tokenizer)
    with pytest.raises(CheckpointError, match=r"missing tensors: model\.norm\.weight"):
        convert(incomplete, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def checkpoint(smollm2_dir):
    return Checkpoint(smollm2_dir)


class TestSmolLM2:
    """The default model, whichever source it came from."""

    def test_its_tokens_are_those_of_an_independent_encoder(self, checkpoint):
        golden = json.loads(Path(__file__).with_name("golden_tokens.json").read_text())
        assert len(golden) >= 20
        for case in golden:
            ids = checkpoint.tokenizer.encode(case["text"])
            assert ids == case["ids"], case["text"]
            assert checkpoint.tokenizer.decode(ids, skip_special_tokens=False) == case["text"]

    def test_its_description(self, checkpoint):
        config = checkpoint.config
        assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
        assert (config.rope.theta, config.max_position_embeddings) == (100000.0, 8192)
        assert config.tie_word_embeddings
        assert config.dtype == "bfloat16"
        assert 2 in checkpoint.eos_token_ids
        assert checkpoint.tokenizer.vocab_size == config.vocab_size == 49152

    def test_its_chat_template(self, checkpoint):
        text = checkpoint.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
        assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
        assert text.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
        ids = checkpoint.tokenizer.chat([{"role": "user", "content": "Hi"}])
        assert ids[0] == 1  # <|im_start|>, whole and alone
        assert checkpoint.tokenizer.decode(ids, skip_special_tokens=False) == text

    def test_its_weights_are_sound(self, checkpoint):
        for name, tensor in checkpoint.tensors.items():
            values = np.asarray(tensor[0:8], np.float32)
            assert np.isfinite(values).all(), name
            assert 1e-4 < np.abs(values).mean() < 100, name
