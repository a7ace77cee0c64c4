"""The decoder-only transformer, written once in the backend's operations.

Families (Llama, Mistral, Qwen2, Qwen3) differ in what ModelConfig and the weights hold, not in code.
"""

from __future__ import annotations

import numpy as np

from cupaged.backends.base import Array, Backend, Rope
from cupaged.config import ModelConfig
from cupaged.engine.batch import Batch
from cupaged.memory.arena import KVArena
from cupaged.models.parameters import DecoderWeights, LayerWeights
from cupaged.models.rope import cos_sin_table


class Decoder:
    """A model's weights and the buffers its steps reuse.

    max_num_tokens: the most tokens a step may hold; max_num_logits: of those, the most whose logits are wanted;
    max_model_len: positions run from 0 to max_model_len - 1.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        backend: Backend,
        *,
        max_num_tokens: int,
        max_num_logits: int,
        max_model_len: int,
    ):
        self.config = config
        self.weights = weights
        self.backend = backend

        table = cos_sin_table(config.rope, config.head_dim, max_model_len)
        self.cos_sin = backend.empty(table.shape, np.float32)
        backend.copy_in(self.cos_sin, table)

        def tokens_by(width: int, dtype=backend.dtype) -> Array:
            return backend.empty((max_num_tokens, width), dtype)

        def logit_rows_by(width: int, dtype=np.float32) -> Array:
            return backend.empty((max_num_logits, width), dtype)

        # The embedding and all that attention and the MLPs have added to it so far. In float32: a 16-bit type would
        # round the whole of it each time, and these roundings would be most of the logits' error.
        self._residual = tokens_by(config.hidden_size, np.float32)
        self._x = tokens_by(config.hidden_size)  # its norm, which they read, unless that is part of a product
        self._qkv = tokens_by(config.qkv_size)
        self._attended = tokens_by(config.num_heads * config.head_dim)
        self._activated = tokens_by(config.intermediate_size)

        self._last_residual = logit_rows_by(config.hidden_size)
        self._last_x = logit_rows_by(config.hidden_size, backend.dtype)
        self._logits = logit_rows_by(config.vocab_size)

    def forward(self, batch: Batch, arena: KVArena) -> Array:
        """Run `batch` (from Backend.upload_batch): its keys and values go into the arena.

        Returns the logits [num_logits, vocab_size] float32 of the tokens in batch.logits_indices, a view of a buffer
        that the next call overwrites; compute_logits gives those of other tokens afterwards. Allocates nothing, waits
        for nothing and reads nothing back. Raises ValueError for a batch that is larger than the buffers.
        """
        ops, weights = self.backend, self.weights
        n = batch.num_tokens
        self._check_fits("tokens", n, "max_num_tokens", self._x)
        residual, x = self._residual[:n], self._x[:n]

        def run_layer(index: int, layer: LayerWeights) -> None:
            self._attention(residual, x, layer, index, batch, arena)
            self._mlp(residual, x, layer)

        ops.embedding(residual, weights.embed_tokens, batch.token_ids)
        ops.for_each_layer(weights.layers, arena, run_layer)
        return self.compute_logits(batch.logits_indices)

    def compute_logits(self, indices: Array) -> Array:
        """The logits [len(indices), vocab_size] float32 of these tokens [int32] of the last batch, in the buffer that
        forward's are in. Raises ValueError for more than max_num_logits."""
        ops, m = self.backend, indices.shape[0]
        self._check_fits("logits", m, "max_num_logits", self._logits)
        residual, x, logits = self._last_residual[:m], self._last_x[:m], self._logits[:m]
        ops.embedding(residual, self._residual, indices)
        ops.rms_norm_linear(logits, residual, self.weights.norm, self.config.rms_norm_eps, x, self.weights.lm_head)
        return logits

    def _attention(
        self, residual: Array, x: Array, layer: LayerWeights, index: int, batch: Batch, arena: KVArena
    ) -> None:
        """residual += o_proj(attention(rope(q_proj(x)), rope(k_proj(x)), v_proj(x))), where x is the residual's norm"""
        ops, config, n = self.backend, self.config, x.shape[0]
        qkv, attended = self._qkv[:n], self._attended[:n]
        ops.rms_norm_linear(qkv, residual, layer.input_norm, config.rms_norm_eps, x, layer.qkv, layer.qkv_bias)
        rope = Rope(self.cos_sin, layer.q_norm, layer.k_norm, config.rms_norm_eps)
        window = config.sliding_window or 0
        ops.rope_and_attend(attended, qkv, arena, index, batch, config.num_heads, config.sm_scale, window, rope)
        ops.linear(residual, attended, layer.o, accumulate=True)

    def _mlp(self, residual: Array, x: Array, layer: LayerWeights) -> None:
        """residual += down_proj(silu(gate_proj(x)) * up_proj(x)), where x is the residual's norm"""
        ops, activated = self.backend, self._activated[: x.shape[0]]
        norm, eps = layer.post_attention_norm, self.config.rms_norm_eps
        ops.rms_norm_linear_silu_and_mul(activated, residual, norm, eps, x, layer.gate_up)
        ops.linear(residual, activated, layer.down, accumulate=True)

    @staticmethod
    def _check_fits(what: str, count: int, limit: str, buffer: Array) -> None:
        if count > buffer.shape[0]:
            raise ValueError(f"batch: {count} {what} are more than {limit}={buffer.shape[0]}")
