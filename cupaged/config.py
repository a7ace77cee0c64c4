"""Frozen descriptions: what a model is (ModelConfig) and how the engine is to run it (EngineConfig)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cupaged.errors import CheckpointError

BLOCK_SIZES = (8, 16, 32, 64)  # tokens a block; what the kernels are instantiated for
HEAD_DIMS = (64, 80, 96, 128, 256)


@dataclass(frozen=True)
class RopeConfig:
    """How positions become rotation angles; `models/rope.py` turns it into tables."""

    kind: str = "default"  # "default" | "linear" | "llama3" | "yarn"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position_embeddings: int = 0  # llama3, yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: scale of cos and sin; None derives it from factor
    rotary_dim: int = 0  # leading dimensions of a head that are rotated; 0 means all


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the Llama family, described by data."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm over each head of q and k, before RoPE
    sliding_window: int | None = None  # attend to the last `sliding_window` tokens only, the own one included
    dtype: str = "bfloat16"  # the checkpoint's
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @property
    def qkv_size(self) -> int:
        """Rows of the packed projection: all query heads, then key heads, then value heads."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def sm_scale(self) -> float:
        return self.head_dim**-0.5

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """From the dictionary of a Hugging Face config.json: the one place that knows its spelling.

        Raises CheckpointError for an architecture, activation or rope type that cupaged does not run.
        """
        raise CheckpointError("config.json: no reader yet")


@dataclass(frozen=True)
class EngineConfig:
    """How to run a model. Names and defaults are vLLM's where it has them.

    kv_cache_memory_bytes: upper bound of the KV cache; None derives one from gpu_memory_utilization.
    gpu_memory_utilization: the share of the device's whole memory that weights, buffers and KV cache may reach.
    max_model_len: the longest prompt + output; None means the model's own limit, lowered to what fits.
    max_num_batched_tokens: tokens a step may compute, prompts and decodes together.
    preallocate: take the whole KV cache at the start instead of growing slab by slab.
    """

    device: str = "auto"  # "auto" | "cuda" | "cpu"
    dtype: str = "auto"  # "auto" | "bfloat16" | "float16" | "float32"
    block_size: int = 16
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    preallocate: bool = False
    seed: int | None = None  # seeds the requests that bring none; None: from the operating system
