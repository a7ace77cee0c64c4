"""Checkpoint tensors arrive packed, converted and complete, or what is wrong with them is named."""

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import CONFIG, HostBackend, random_tensors

from cupaged.config import ModelConfig
from cupaged.errors import CheckpointError
from cupaged.weights import packing
from cupaged.weights.packing import load_weights, parameter_bytes, parameter_shapes, random_weights

VARIANTS = {
    "llama": CONFIG,
    "untied": {**CONFIG, "tie_word_embeddings": False},
    "qwen2": {**CONFIG, "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {**CONFIG, "architectures": ["Qwen3ForCausalLM"]},
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_arrives_in_its_place(variant, dtype):
    config = ModelConfig.from_hf(VARIANTS[variant])
    tensors = random_tensors(VARIANTS[variant])
    weights = load_weights(tensors, config, HostBackend(dtype))

    def same(array, *names):
        expected = np.concatenate([tensors[name] for name in names])
        assert array.dtype == dtype
        np.testing.assert_array_equal(array.astype(np.float32), expected)

    same(weights.embed_tokens, "model.embed_tokens.weight")
    same(weights.norm, "model.norm.weight")
    if config.tie_word_embeddings:
        assert weights.lm_head is weights.embed_tokens
    else:
        same(weights.lm_head, "lm_head.weight")
    assert len(weights.layers) == 2
    for i, layer in enumerate(weights.layers):
        at = f"model.layers.{i}."
        same(layer.input_norm, at + "input_layernorm.weight")
        same(layer.qkv, *(f"{at}self_attn.{name}_proj.weight" for name in "qkv"))
        same(layer.o, at + "self_attn.o_proj.weight")
        same(layer.post_attention_norm, at + "post_attention_layernorm.weight")
        assert layer.gate_up.shape == (2 * config.intermediate_size, config.hidden_size)
        same(layer.gate_up[0::2], at + "mlp.gate_proj.weight")
        same(layer.gate_up[1::2], at + "mlp.up_proj.weight")
        same(layer.down, at + "mlp.down_proj.weight")
        assert (layer.qkv_bias is not None) == config.qkv_bias
        assert (layer.q_norm is not None) == (layer.k_norm is not None) == config.qk_norm
        if config.qkv_bias:
            same(layer.qkv_bias, *(f"{at}self_attn.{name}_proj.bias" for name in "qkv"))
        if config.qk_norm:
            same(layer.q_norm, at + "self_attn.q_norm.weight")
            same(layer.k_norm, at + "self_attn.k_norm.weight")


def test_large_tensors_go_over_in_pieces(monkeypatch, tensors, backend):
    row_chunks = packing.row_chunks
    monkeypatch.setattr(packing, "row_chunks", lambda shape, *_: row_chunks(shape, max_elements=1000))
    weights = load_weights(tensors, ModelConfig.from_hf(CONFIG), backend)
    assert backend.largest_copy <= 1000
    np.testing.assert_array_equal(weights.layers[1].down, tensors["model.layers.1.mlp.down_proj.weight"])
    for i, name in enumerate(("gate", "up")):
        np.testing.assert_array_equal(
            weights.layers[1].gate_up[i::2], tensors[f"model.layers.1.mlp.{name}_proj.weight"]
        )
    np.testing.assert_array_equal(weights.layers[1].gate_up[1::2], tensors["model.layers.1.mlp.up_proj.weight"])


def test_harmless_extras_are_ignored(tensors, backend):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # tied
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(32, np.float32)
    load_weights(tensors, ModelConfig.from_hf(CONFIG), backend)


def test_all_that_is_wrong_is_in_one_line(tensors, backend):
    del tensors["model.layers.1.mlp.down_proj.weight"]
    del tensors["model.norm.weight"]
    tensors["model.embed_tokens.weight"] = np.zeros((63, 256), np.float32)
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((256, 256), np.int8)
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((1, 1), np.float32)
    backend.empty = None  # nothing may be allocated
    with pytest.raises(CheckpointError) as error:
        load_weights(tensors, ModelConfig.from_hf(CONFIG), backend)
    message = str(error.value)
    assert "missing tensors: model.layers.1.mlp.down_proj.weight, model.norm.weight;" in message
    assert "model.embed_tokens.weight has shape (63, 256) instead of (64, 256)" in message
    assert "model.layers.0.self_attn.q_proj.weight (int8)" in message
    assert "unknown tensors: model.layers.2.mlp.up_proj.weight;" in message
    assert "\n" not in message


def test_a_wholly_different_model_gives_a_short_line(backend):
    config = ModelConfig.from_hf({**CONFIG, "num_hidden_layers": 100})
    with pytest.raises(CheckpointError, match="and 898 more") as error:  # 100 * 9 + 2 - 4
        load_weights({}, config, backend)
    assert len(str(error.value)) < 400


def test_parameter_bytes(tensors):
    config = ModelConfig.from_hf(CONFIG)
    count = sum(tensor.size for tensor in tensors.values())
    assert parameter_bytes(config, "bfloat16") == parameter_bytes(config, np.float16) == 2 * count
    assert parameter_bytes(config, "float32") == 4 * count


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_weights_are_small_complete_and_repeatable(variant):
    config = ModelConfig.from_hf({**VARIANTS[variant], "vocab_size": 20_000})  # more values than the pool holds
    weights = random_weights(config, HostBackend(), seed=3)
    again = random_weights(config, HostBackend(), seed=3)
    other = random_weights(config, HostBackend(), seed=4)
    np.testing.assert_array_equal(weights.layers[1].qkv, again.layers[1].qkv)
    assert (weights.layers[1].qkv != other.layers[1].qkv).any()
    for array in (weights.embed_tokens, weights.lm_head, weights.layers[0].gate_up, weights.layers[1].down):
        assert 0.019 < array.std() < 0.021  # not NaN either
        assert abs(array.mean()) < 1e-3
    assert (weights.norm == 1).all()
    assert len({row.tobytes() for row in weights.embed_tokens}) == 20_000  # no two rows alike


def test_the_shapes_are_those_of_the_golden_models(request):
    """transformers' own checkpoints of each family hold exactly these tensors."""
    from cupaged.weights.checkpoint import Checkpoint

    golden = request.config.rootpath / "tests" / "model" / "golden"
    directories = [path.parent for path in golden.glob("*/config.json")]
    assert len(directories) >= 4
    for directory in directories:
        checkpoint = Checkpoint(directory)
        shapes = parameter_shapes(checkpoint.config)
        assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == shapes
