"""Directories in Hugging Face layout: shards, generation defaults, EOS ids, and what is wrong with a directory."""

import json

import numpy as np
import pytest
from checkpoint_files import CONFIG
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from cupaged.errors import CheckpointError, ModelNotFoundError
from cupaged.weights.checkpoint import Checkpoint


def write_json(path, value):
    path.write_text(json.dumps(value))


def write_tokenizer(path, **config):
    vocab = {token: i for i, token in enumerate(["a", "b", "<eos>", "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(["<eos>", "<end>"])
    tokenizer.save(str(path / "tokenizer.json"))
    write_json(path / "tokenizer_config.json", config)


@pytest.fixture
def sharded_dir(tmp_path, tensors):
    names = sorted(tensors)
    files = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    write_json(tmp_path / "config.json", CONFIG)
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    write_json(tmp_path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return tmp_path


def change_index(path, **changes):
    index = path / "model.safetensors.index.json"
    weight_map = {**json.loads(index.read_text())["weight_map"], **changes}
    write_json(index, {"weight_map": weight_map})


def test_one_file(model_dir, tensors):
    checkpoint = Checkpoint(model_dir)
    assert checkpoint.config.num_layers == 2
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        np.testing.assert_array_equal(checkpoint.tensors[name], expected)


def test_shards(sharded_dir, tensors):
    read = Checkpoint(sharded_dir).tensors
    assert read.keys() == tensors.keys()
    for name, expected in tensors.items():
        np.testing.assert_array_equal(read[name], expected)


def test_a_missing_shard_is_named(sharded_dir):
    (sharded_dir / "model-2-of-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"are missing: model-2-of-2\.safetensors"):
        Checkpoint(sharded_dir)


def test_a_tensor_that_is_not_in_its_shard_is_named(sharded_dir):
    change_index(sharded_dir, extra="model-1-of-2.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor extra is not in model-1-of-2\.safetensors"):
        Checkpoint(sharded_dir)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", 3])
def test_an_index_leads_nowhere_else(sharded_dir, file):
    change_index(sharded_dir, extra=file)
    with pytest.raises(CheckpointError, match="must name files beside it"):
        Checkpoint(sharded_dir)


def test_a_damaged_index_is_named(sharded_dir):
    (sharded_dir / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json: not valid JSON"):
        Checkpoint(sharded_dir)
    write_json(sharded_dir / "model.safetensors.index.json", {})
    with pytest.raises(CheckpointError, match="weight_map is missing"):
        Checkpoint(sharded_dir)


def test_nothing_there(tmp_path):
    with pytest.raises(ModelNotFoundError, match="none: no such file or directory"):
        Checkpoint(tmp_path / "none")


def test_no_config(model_dir):
    (model_dir / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json there"):
        Checkpoint(model_dir)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "must hold a JSON object"), ("{}", "m")])
def test_a_damaged_config_is_named(model_dir, text, message):
    (model_dir / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"{model_dir}.*config.json.*{message}"):
        Checkpoint(model_dir)


def test_no_weights(model_dir):
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors there, no weights"):
        Checkpoint(model_dir)
    (model_dir / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin, which is not read"):
        Checkpoint(model_dir)


def test_truncated_weights(model_dir):
    file = model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged safetensors file: truncated"):
        Checkpoint(model_dir)


def test_no_tokenizer_is_no_trouble_until_it_is_wanted(model_dir):
    checkpoint = Checkpoint(model_dir)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json there"):
        checkpoint.tokenizer  # noqa: B018


def test_eos_ids_are_gathered_from_everywhere(model_dir):
    write_json(model_dir / "config.json", {**CONFIG, "eos_token_id": 0})
    write_json(model_dir / "generation_config.json", {"eos_token_id": [1, 2]})
    write_tokenizer(model_dir, eos_token={"content": "<end>"})
    assert Checkpoint(model_dir).eos_token_ids == (0, 1, 2, 3)
    write_tokenizer(model_dir)
    assert Checkpoint(model_dir).eos_token_ids == (0, 1, 2)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {}),
        ({"temperature": None, "top_k": None}, {}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        ({"temperature": 0.6}, {"temperature": 0.6}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"top_k": 20, "min_p": 0.1, "max_new_tokens": 64}, {"top_k": 20, "min_p": 0.1, "max_tokens": 64}),
    ],
)
def test_sampling_defaults(model_dir, generation, expected):
    write_json(model_dir / "generation_config.json", generation)
    assert Checkpoint(model_dir).sampling_defaults == expected


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"temperature": "hot"}, "generation_config.json: temperature must be a number; got 'hot'"),
        ({"temperature": -1.0}, "generation_config.json: temperature"),
        ({"top_p": 2}, "generation_config.json: top_p must be in"),
        ({"top_k": 1.5}, "generation_config.json: top_k must be an integer"),
        ({"eos_token_id": "x"}, "generation_config.json: eos_token_id"),
        ({"do_sample": 1}, "generation_config.json: do_sample must be true or false"),
    ],
)
def test_bad_generation_values_are_named(model_dir, generation, message):
    write_json(model_dir / "generation_config.json", generation)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(model_dir)


def test_wishes_that_are_not_followed_are_reported(model_dir):
    write_json(model_dir / "generation_config.json", {"num_beams": 3, "min_new_tokens": 0, "typical_p": 0.9})
    typical, beams = Checkpoint(model_dir).warnings
    assert "num_beams 3" in beams
    assert "typical_p 0.9" in typical
    write_json(model_dir / "generation_config.json", {"repetition_penalty": 1.1, "num_beams": 1})
    assert Checkpoint(model_dir).sampling_defaults == {"repetition_penalty": 1.1}
    assert Checkpoint(model_dir).warnings == []
