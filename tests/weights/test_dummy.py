"""Models of random weights, from a configuration alone."""

import json

import numpy as np
import pytest
from checkpoint_files import CONFIG, HostBackend

from cupaged import LLM, SamplingParams
from cupaged.config import ModelConfig
from cupaged.errors import CheckpointError, ModelNotFoundError
from cupaged.kernels.checks import BFLOAT16
from cupaged.weights.dummy import DummyCheckpoint, read_config
from cupaged.weights.packing import load_weights, parameter_shapes

BFLOAT16_CONFIG = {**CONFIG, "torch_dtype": "bfloat16", "eos_token_id": [3, 5]}


@pytest.fixture
def config_file(tmp_path):
    """config.json in a directory of its own."""
    file = tmp_path / "model" / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(BFLOAT16_CONFIG))
    return file


def test_a_config_is_read_from_its_directory_or_by_its_own_name(config_file):
    assert read_config(config_file.parent) == read_config(config_file) == ModelConfig.from_hf(BFLOAT16_CONFIG)
    other = config_file.rename(config_file.parent / "shapes-of-something.json")
    assert read_config(other) == ModelConfig.from_hf(BFLOAT16_CONFIG)


def test_what_is_wrong_with_a_config_is_named(tmp_path, config_file):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelNotFoundError, match=r"no such file; name a directory with a config\.json"):
            read_config(path)
    config_file.write_text(json.dumps({**CONFIG, "hidden_act": "gelu"}))
    with pytest.raises(CheckpointError, match="hidden_act 'gelu'") as error:
        read_config(config_file)
    assert str(config_file) in str(error.value)


@pytest.mark.parametrize("fields", [{}, {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}])
def test_the_weights_have_the_shapes_of_a_real_checkpoints(config_file, fields):
    config_file.write_text(json.dumps({**BFLOAT16_CONFIG, **fields}))
    checkpoint = DummyCheckpoint(config_file)
    config = checkpoint.config
    assert checkpoint.eos_token_ids == (3, 5)
    weights = checkpoint.load(config, HostBackend(np.float32))
    tensors = {name: np.zeros(shape, np.float32) for name, shape in parameter_shapes(config).items()}
    expected = load_weights(tensors, config, HostBackend(np.float32))
    for part, other in zip((weights, *weights.layers), (expected, *expected.layers), strict=True):
        for name, array in vars(other).items():
            if name != "layers":
                assert np.shape(getattr(part, name)) == np.shape(array), name
    assert (weights.layers[0].qkv_bias is not None) == config.qkv_bias == bool(fields)
    assert (weights.lm_head is weights.embed_tokens) == config.tie_word_embeddings


def test_all_backends_get_the_same_weights(config_file):
    """Those of the checkpoint's dtype, rounded as a checkpoint's would be."""
    checkpoint = DummyCheckpoint(config_file)
    exact, rounded = (checkpoint.load(checkpoint.config, HostBackend(dtype)) for dtype in (np.float32, BFLOAT16))
    for name in ("qkv", "o", "gate_up", "down", "input_norm"):
        values = getattr(exact.layers[1], name)
        assert np.array_equal(getattr(rounded.layers[1], name).astype(np.float32), values)
        assert values.std() == pytest.approx(0 if name == "input_norm" else 0.02, rel=0.05)


def test_an_llm_needs_nothing_but_the_config(config_file):
    greedy = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    outputs = []
    for path in (config_file, config_file.parent):
        with LLM(path, device="cpu", load_format="dummy") as llm:
            (result,) = llm.generate([1, 2, 3], greedy)
            outputs.append(result.outputs[0].token_ids)
            with pytest.raises(ValueError, match="text needs a tokenizer"):
                llm.generate("text")
            with pytest.raises(ValueError, match="give token ids"):
                llm.chat([{"role": "user", "content": "Hello"}])
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 5
    assert all(0 <= token_id < CONFIG["vocab_size"] for token_id in outputs[0])


def test_an_unknown_load_format_is_refused(config_file):
    with pytest.raises(ValueError, match="load_format must be auto or dummy; got 'random'"):
        LLM(config_file, device="cpu", load_format="random")
