"""A GGUF file told in Hugging Face's words: config.json's keys, the tensors' names and order, the tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cupaged.errors import CheckpointError
from cupaged.tokenizer import Tokenizer
from cupaged.weights.gguf_file import GGUFFile, GGUFTensor
from cupaged.weights.gguf_tokenizer import read_tokenizer

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"  # llama3 scaling, one divisor a frequency, instead of its parameters


class GGUFModel:
    """What a Hugging Face directory would hold, made from a GGUF file.

    config: config.json's dictionary; generation_config: generation_config.json's; tensors: Hugging Face name ->
    GGUFTensor in Hugging Face's order of rows. Raises CheckpointError.
    """

    def __init__(self, path: Path):
        self._file = GGUFFile(path)
        self._path = path
        self.metadata = self._file.metadata
        self.architecture = self._get("general.architecture", str)
        if self.architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{path}: GGUF architecture {self.architecture!r} is not supported; {', '.join(ARCHITECTURES)} are"
            )
        if (parts := self._get("split.count", int, 0)) > 1:
            raise CheckpointError(f"{path}: one of {parts} parts; join them with llama.cpp's gguf-split --merge first")
        if self._model_key("expert_count", int, 0):
            raise CheckpointError(f"{path}: mixture-of-experts models are not supported")
        self.config = self._config()
        self.generation_config = self._generation_config()
        self.tensors = self._tensors()

    def tokenizer(self) -> Tokenizer:
        backend, tokenizer_config = read_tokenizer(self.metadata, self._path)
        template = self._get("tokenizer.chat_template", str, "") or None
        return Tokenizer(backend, tokenizer_config, template, source=self._path)

    def _get(self, key: str, kind: type | tuple[type, ...], default: Any = None):
        """A metadata value of the kind; without a default it has to be there."""
        value = self.metadata.get(key, default)
        if value is None:
            raise CheckpointError(f"{self._path}: GGUF metadata {key} is missing")
        if not isinstance(value, kind):
            raise CheckpointError(f"{self._path}: GGUF metadata {key} has the wrong type: {str(value)[:40]!r}")
        return value

    def _model_key(self, key: str, kind: type | tuple[type, ...], default: Any = None):
        return self._get(f"{self.architecture}.{key}", kind, default)

    def _token_id(self, name: str) -> int | None:
        token_id = self._get(f"tokenizer.ggml.{name}_token_id", int, -1)
        return token_id if token_id >= 0 else None

    def _config(self) -> dict[str, Any]:
        num_heads = self._model_key("attention.head_count", int)
        hidden_size = self._model_key("embedding_length", int)
        head_dim = self._model_key("attention.key_length", int, hidden_size // max(1, num_heads))
        config = {
            "architectures": [ARCHITECTURES[self.architecture]],
            "model_type": self.architecture,
            "vocab_size": self._vocab_size(),
            "hidden_size": hidden_size,
            "intermediate_size": self._model_key("feed_forward_length", int),
            "num_hidden_layers": self._model_key("block_count", int),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._model_key("attention.head_count_kv", int, num_heads),
            "head_dim": head_dim,
            "max_position_embeddings": self._model_key("context_length", int),
            "rms_norm_eps": _shortest(self._model_key("attention.layer_norm_rms_epsilon", float)),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": "output.weight" not in self._file.tensors,
            "rope_theta": _shortest(self._model_key("rope.freq_base", (int, float), 10000.0)),
            "rope_scaling": self._rope_scaling(head_dim),
            "torch_dtype": self._dtype(),
        }
        rotary_dim = self._model_key("rope.dimension_count", int, head_dim)
        if rotary_dim != head_dim:
            config["partial_rotary_factor"] = rotary_dim / head_dim
        for name, key in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
            if (token_id := self._token_id(name)) is not None:
                config[key] = token_id
        return config

    def _generation_config(self) -> dict[str, Any]:
        """Besides EOS, the ends of a turn and of a message end an output."""
        config = {key: self.config[key] for key in ("bos_token_id", "pad_token_id") if key in self.config}
        ends = {self._token_id(name) for name in ("eos", "eot", "eom")} - {None}
        if ids := sorted(ends):
            config["eos_token_id"] = ids if len(ids) > 1 else ids[0]
        return config

    def _vocab_size(self) -> int:
        """Rows of the embedding, which may be padded beyond the tokens."""
        if "token_embd.weight" not in self._file.tensors:
            raise CheckpointError(f"{self._path}: tensor token_embd.weight is missing; the file holds no whole model")
        return self._file.tensors["token_embd.weight"].shape[0]

    def _dtype(self) -> str:
        """The 16-bit type that the matrices are stored in, bfloat16 for quantised ones."""
        kinds = {tensor.type_name for tensor in self._file.tensors.values() if len(tensor.shape) > 1}
        return {frozenset({"F16"}): "float16", frozenset({"F32"}): "float32"}.get(frozenset(kinds), "bfloat16")

    def _rope_scaling(self, head_dim: int) -> dict[str, Any] | None:
        if _ROPE_FACTORS in self._file.tensors:
            return self._llama3_scaling(head_dim)
        kind = self._model_key("rope.scaling.type", str, "none")
        if kind == "none":
            return None
        scaling = {"rope_type": kind, "factor": _shortest(self._model_key("rope.scaling.factor", (int, float)))}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = self._model_key("rope.scaling.original_context_length", int)
            for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
                if (value := self._model_key("rope.scaling." + key, (int, float), 0)) > 0:
                    scaling[name] = _shortest(value)
        return scaling

    def _llama3_scaling(self, head_dim: int) -> dict[str, Any]:
        """The parameters that the file's divisors were made from: Llama 3.1's to 3.3's, if those reproduce them."""
        divisors = self._file.tensors[_ROPE_FACTORS][0 : head_dim // 2].astype(np.float64)
        factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
        theta = self._model_key("rope.freq_base", (int, float), 10000.0)
        wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
        smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
            raise CheckpointError(
                f"{self._path}: tensor {_ROPE_FACTORS} is not Llama 3's rope scaling, and no other is supported"
            )
        return {
            "rope_type": "llama3",
            "factor": _shortest(factor),
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }

    def _tensors(self) -> dict[str, GGUFTensor]:
        tensors = {}
        for name, tensor in self._file.tensors.items():
            if name == _ROPE_FACTORS:
                continue  # in the config
            if self.architecture == "llama" and name.startswith("blk."):
                if ".attn_q." in name:
                    tensor = self._unpermuted(name, tensor, self.config["num_attention_heads"])
                elif ".attn_k." in name:
                    tensor = self._unpermuted(name, tensor, self.config["num_key_value_heads"])
            tensors[_hf_name(name)] = tensor
        return tensors

    def _unpermuted(self, name: str, tensor: GGUFTensor, num_heads: int) -> GGUFTensor:
        """llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head, Hugging Face (i, i + head_dim / 2)."""
        rows = tensor.shape[0]
        if num_heads < 1 or rows % (2 * num_heads):
            raise CheckpointError(f"{self._path}: tensor {name} has {rows} rows, which {num_heads} heads can't share")
        order = np.arange(rows).reshape(num_heads, rows // num_heads // 2, 2).swapaxes(1, 2).reshape(-1)
        return replace(tensor, row_order=order)


def _hf_name(name: str) -> str:
    """Hugging Face's name; an unknown tensor keeps its own, and the check of the weights names it."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    prefix, _, rest = name.partition(".")
    layer, _, part = rest.partition(".")
    if prefix == "blk" and layer.isdecimal() and part in _LAYER_NAMES:
        return f"model.layers.{layer}.{_LAYER_NAMES[part]}"
    return name


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: GGUF's 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))
