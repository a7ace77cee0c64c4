"""Hugging Face's config.json: typed reads that name a bad key, and its translation to ModelConfig."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from cupaged.config import ModelConfig, RopeConfig
from cupaged.errors import CheckpointError

CHECKPOINT_DTYPES = ("bfloat16", "float16", "float32")
ARCHITECTURES = {  # model_type -> the architecture that names it
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
DEFAULT_HEAD_DIM = {"Qwen3ForCausalLM": 128}  # the others: hidden_size / num_attention_heads

_REQUIRED: Any = object()


class Keys:
    """Typed reads from one JSON object. A null counts as missing, as it does for transformers.

    Every method takes a default; without one the key is required. Raises CheckpointError that names file and key.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{where} must be a JSON object; got {type(values).__name__}")
        self.values = values
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def _read(self, key: str, default, accepts: Callable[[Any], bool], kind: str):
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise CheckpointError(f"{self.where}: {key} is missing")
            return default
        if not accepts(value):
            raise CheckpointError(f"{self.where}: {key} must be {kind}; got {value!r}")
        return value

    def count(self, key: str, default=_REQUIRED) -> int:
        return self._read(key, default, lambda v: _is_int(v) and v > 0, "an integer >= 1")

    def natural(self, key: str, default=_REQUIRED) -> int:
        return self._read(key, default, lambda v: _is_int(v) and v >= 0, "an integer >= 0")

    def number(self, key: str, default=_REQUIRED) -> float:
        return self._read(key, default, lambda v: _is_int(v) or (isinstance(v, float) and math.isfinite(v)), "a number")

    def boolean(self, key: str, default=_REQUIRED) -> bool:
        return self._read(key, default, lambda v: isinstance(v, bool), "true or false")

    def string(self, key: str, default=_REQUIRED) -> str:
        return self._read(key, default, lambda v: isinstance(v, str), "a string")

    def strings(self, key: str, default=_REQUIRED) -> list[str]:
        def accepts(value) -> bool:
            return isinstance(value, list) and all(isinstance(v, str) for v in value)

        return self._read(key, default, accepts, "a list of strings")

    def mapping(self, key: str, default=_REQUIRED) -> Mapping[str, Any]:
        return self._read(key, default, lambda v: isinstance(v, Mapping), "an object")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or a list of them, none when missing."""

        def accepts(value) -> bool:
            return all(_is_int(v) and v >= 0 for v in (value if isinstance(value, list) else [value]))

        value = self._read(key, [], accepts, "a token id or a list of token ids")
        return tuple(value) if isinstance(value, list) else (value,)


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """config.json's dictionary, as transformers 4 or 5 writes it. ModelConfig.from_hf is the public name."""
    keys = Keys(values, "config.json")
    architecture = _architecture(keys)
    _refuse_what_is_not_computed(keys)
    hidden_size, num_heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    num_kv_heads = keys.count("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads ({num_heads}) must be a multiple of num_key_value_heads ({num_kv_heads})"
        )
    if "head_dim" in keys or architecture in DEFAULT_HEAD_DIM:
        head_dim = keys.count("head_dim", DEFAULT_HEAD_DIM.get(architecture))
    elif hidden_size % num_heads:
        raise CheckpointError(
            f"config.json: hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({num_heads})"
            " when head_dim is missing"
        )
    else:
        head_dim = hidden_size // num_heads
    num_layers = keys.count("num_hidden_layers")
    max_position_embeddings = keys.count("max_position_embeddings")
    bos_token_ids = keys.token_ids("bos_token_id")
    return ModelConfig(
        architecture=architecture,
        vocab_size=keys.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=keys.count("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope=_rope(keys, head_dim, max_position_embeddings),
        tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_window=_sliding_window(keys, architecture, num_layers),
        dtype=_dtype(keys),
        eos_token_ids=keys.token_ids("eos_token_id"),
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
    )


def _architecture(keys: Keys) -> str:
    names = keys.strings("architectures", [])
    if not names:
        model_type = keys.string("model_type")
        names = [ARCHITECTURES.get(model_type, model_type)]
    if names[0] not in ARCHITECTURES.values():
        raise CheckpointError(
            f"config.json: architecture {names[0]!r} is not supported; these are: {', '.join(ARCHITECTURES.values())}"
        )
    return names[0]


def _refuse_what_is_not_computed(keys: Keys) -> None:
    if "quantization_config" in keys:
        method = keys.mapping("quantization_config").get("quant_method", "of an unnamed method")
        raise CheckpointError(
            f"config.json: quantization_config ({method}) is not supported; use the unquantised model or a GGUF file"
        )
    for key in ("attention_bias", "mlp_bias"):  # these put biases on o_proj and in the MLP; Qwen2's qkv bias has no key
        if keys.boolean(key, False):
            raise CheckpointError(f"config.json: {key} true is not supported; only models without these biases are")
    activation = keys.string("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"config.json: hidden_act {activation!r} is not supported; only 'silu' is")


def _dtype(keys: Keys) -> str:
    dtype = keys.string("dtype" if "dtype" in keys else "torch_dtype", "bfloat16").removeprefix("torch.")
    if dtype not in CHECKPOINT_DTYPES:
        raise CheckpointError(f"config.json: dtype {dtype!r} is not supported; {', '.join(CHECKPOINT_DTYPES)} are")
    return dtype


def _sliding_window(keys: Keys, architecture: str, num_layers: int) -> int | None:
    """The window when every layer slides, None when none does; Llama has no windows whatever its config says."""
    if architecture == "LlamaForCausalLM" or "sliding_window" not in keys:
        return None
    window = keys.count("sliding_window")
    if architecture == "MistralForCausalLM":
        default_types = ["sliding_attention"] * num_layers
    elif keys.boolean("use_sliding_window", False):  # Qwen: the upper layers slide
        first = keys.natural("max_window_layers", 28)
        default_types = ["full_attention"] * min(first, num_layers) + ["sliding_attention"] * (num_layers - first)
    else:
        return None
    layer_types = set(keys.strings("layer_types", default_types))
    if unknown := layer_types - {"full_attention", "sliding_attention"}:
        raise CheckpointError(f"config.json: layer_types {', '.join(sorted(unknown))} are not supported")
    if len(layer_types) > 1:
        raise CheckpointError("config.json: layers with and without a sliding window are not supported together")
    return window if layer_types == {"sliding_attention"} else None


def _rope(keys: Keys, head_dim: int, max_position_embeddings: int) -> RopeConfig:
    """From rope_parameters (transformers 5), or rope_theta and rope_scaling (transformers 4)."""
    name = "rope_parameters" if "rope_parameters" in keys else "rope_scaling"
    rope = Keys(keys.mapping(name, {}), f"config.json: {name}")
    if any(isinstance(value, Mapping) for value in rope.values.values()):
        raise CheckpointError(f"config.json: {name} that differ between layers are not supported")

    def either(key: str, default: float) -> float:  # both spellings are found in both places
        return rope.number(key, keys.number(key, default))

    kind = rope.string("rope_type" if "rope_type" in rope else "type", "default")
    rotary_dim = int(head_dim * either("partial_rotary_factor", 1.0))
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise CheckpointError(
            f"config.json: partial_rotary_factor rotates {rotary_dim} of {head_dim} dimensions; it must be an even"
            " number of them, at least 2"
        )
    common = {
        "kind": kind,
        "theta": float(either("rope_theta", 10000.0)),
        "rotary_dim": rotary_dim if rotary_dim < head_dim else 0,
    }
    if common["theta"] <= 0:
        raise CheckpointError(f"config.json: rope_theta must be above 0; got {common['theta']!r}")
    original = keys.count(
        "original_max_position_embeddings", rope.count("original_max_position_embeddings", max_position_embeddings)
    )
    if kind == "default":
        return RopeConfig(**common)
    if kind == "linear":
        return RopeConfig(**common, factor=_factor(rope))
    if kind == "llama3":
        return RopeConfig(
            **common,
            factor=_factor(rope),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position_embeddings=original,
        )
    if kind == "yarn":
        if not rope.boolean("truncate", True):
            raise CheckpointError(f"{rope.where}: truncate false is not supported for rope type 'yarn'")
        factor = _factor(rope, default=max_position_embeddings / original)
        return RopeConfig(
            **common,
            factor=factor,
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            attention_factor=rope.number("attention_factor", _yarn_attention_factor(rope, factor)),
            original_max_position_embeddings=original,
        )
    raise CheckpointError(f"{rope.where}: rope type {kind!r} is not supported; default, linear, llama3 and yarn are")


def _factor(rope: Keys, default=_REQUIRED) -> float:
    factor = rope.number("factor", default)
    if factor <= 0:
        raise CheckpointError(f"{rope.where}: factor must be above 0; got {factor!r}")
    return factor


def _yarn_attention_factor(rope: Keys, factor: float) -> float | None:
    """DeepSeek's spelling: the ratio of two scales. None leaves it to YaRN's own formula."""
    mscale, mscale_all_dim = rope.number("mscale", 0), rope.number("mscale_all_dim", 0)
    if not (mscale and mscale_all_dim):
        return None
    growth = 0.1 * math.log(max(factor, 1.0))
    return (mscale * growth + 1.0) / (mscale_all_dim * growth + 1.0)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
