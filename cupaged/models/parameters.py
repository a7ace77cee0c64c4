"""The decoder's weights as the kernels want them: packed where one matrix product serves several projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Array = Any


@dataclass
class LayerWeights:
    """All in the backend's dtype; matrices are [out_features, in_features]."""

    input_norm: Array  # [hidden_size]
    qkv: Array  # [qkv_size, hidden_size] query heads, key heads, value heads
    o: Array  # [hidden_size, num_heads * head_dim]
    post_attention_norm: Array  # [hidden_size]
    gate_up: Array  # [2 * intermediate_size, hidden_size] row 0 of gate, row 0 of up, row 1 of gate ...
    down: Array  # [hidden_size, intermediate_size]
    qkv_bias: Array | None = None  # [qkv_size]
    q_norm: Array | None = None  # [head_dim]
    k_norm: Array | None = None  # [head_dim]


@dataclass
class DecoderWeights:
    embed_tokens: Array  # [vocab_size, hidden_size]
    layers: list[LayerWeights]
    norm: Array  # [hidden_size]
    lm_head: Array  # [vocab_size, hidden_size]; the same array as embed_tokens when they are tied
