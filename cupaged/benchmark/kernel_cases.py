"""The operations one by one, in a model's shapes: how to launch them, and what they must move and compute."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from cupaged.backends.base import LOGIT_EDIT, SAMPLING_ROW, Array, Backend
from cupaged.config import ModelConfig
from cupaged.engine.batch import Batch
from cupaged.errors import OutOfMemoryError
from cupaged.kernels.checks import ceil_div
from cupaged.memory.arena import KVArena, KVLayout
from cupaged.memory.budget import format_bytes
from cupaged.models.rope import cos_sin_table

FAMILIES = (
    "linear", "paged_decode", "paged_prefill", "rope", "rms_norm", "embedding", "sampler", "logprobs",
    "logits", "copy_blocks",
)  # fmt: skip

COLD_L2_FACTOR = 4  # launches in turn go over this many times the L2 cache, so that none finds there what it reads
MAX_SETS = 64  # of arrays to go over; what is so small that these fit in L2 is bound by its latency anyway
MAX_LOGIT_ROWS = 256  # logits are wanted of one token a sequence, so of large steps only for a few
POOL_SIZE = 1 << 22  # random values that arrays are filled with, again and again
NUM_COPIED_BLOCKS = 64
EDITS_A_ROW = 64
NUM_LOGPROBS = 5


@dataclass
class Case:
    """One operation in one shape, with the arrays that it needs.

    launch(i): start it on set i % num_sets of those arrays that must not be found in the L2 cache. Bytes: that it
    can't do without, each counted once.
    """

    shape: str
    launch: Callable[[int], None]
    num_sets: int
    bytes_read: int
    bytes_written: int
    flops: int = 0


class KernelCases:
    """Makes the cases of a model on a backend.

    rows: tokens of a step, or rows of logits. decode: (sequences, tokens in each) of steps that add a token to each;
    prefill: the same of prompts that are computed whole.
    """

    def __init__(
        self,
        backend: Backend,
        model: ModelConfig,
        *,
        block_size: int,
        l2_bytes: int,
        rows: Sequence[int],
        decode: Sequence[tuple[int, int]],
        prefill: Sequence[tuple[int, int]],
    ):
        self.backend, self.model, self.block_size, self.l2_bytes = backend, model, block_size, l2_bytes
        self.rows, self.decode, self.prefill = rows, decode, prefill
        self._rng = np.random.default_rng(0)
        sequences = [*decode, *prefill]
        num_tokens = [num_seqs for num_seqs, _ in decode] + [num_seqs * length for num_seqs, length in prefill]
        backend.reserve(
            model,
            max(num_tokens, default=1),
            max((*(num_seqs for num_seqs, _ in sequences), *(min(m, MAX_LOGIT_ROWS) for m in rows)), default=1),
            max((length for _, length in sequences), default=1),
        )

    def makers(self) -> Iterator[tuple[str, Callable[[], Case]]]:
        """(family, what makes the case): one case's arrays can go before the next one's are made.

        Making one raises OutOfMemoryError when it doesn't fit.
        """
        model = self.model
        for name, n, k in (
            ("qkv", model.qkv_size, model.hidden_size),
            ("o", model.hidden_size, model.num_heads * model.head_dim),
            ("gate_up", 2 * model.intermediate_size, model.hidden_size),
            ("down", model.hidden_size, model.intermediate_size),
            ("lm_head", model.vocab_size, model.hidden_size),
        ):
            for m in self.rows:
                yield "linear", partial(self._linear, name, m, n, k)
        for num_seqs, length in self.decode:
            yield "paged_decode", partial(self._attention, num_seqs, length, query_len=1)
        for num_seqs, length in self.prefill:
            yield "paged_prefill", partial(self._attention, num_seqs, length, query_len=length)
        for family, make in (
            ("rope", self._rope),
            ("rms_norm", self._rms_norm),
            ("embedding", self._embedding),
        ):
            for m in self.rows:
                yield family, partial(make, m)
        for family, make in (
            ("sampler", partial(self._sampler, "greedy", temperature=0, top_k=0, top_p=1)),
            ("sampler", partial(self._sampler, "top_k 40, top_p 0.95", temperature=0.8, top_k=40, top_p=0.95)),
            ("logprobs", self._logprobs),
            ("logits", self._keep_allowed),
            ("logits", self._edit_logits),
        ):
            for m in sorted({min(m, MAX_LOGIT_ROWS) for m in self.rows}):
                yield family, partial(make, m=m)
        yield "copy_blocks", self._copy_blocks

    # -- cases -------------------------------------------------------------------------------------------------

    def _linear(self, name: str, m: int, n: int, k: int) -> Case:
        """As in the decoder: o and down add to the residual, which is float32, as the logits are; gate_up ends with the
        activation, which leaves half as many columns."""
        item, accumulate = self.backend.dtype.itemsize, name in ("o", "down")
        out_dtype = np.dtype(np.float32) if accumulate or name == "lm_head" else self.backend.dtype
        out_shape = (m, n // 2) if name == "gate_up" else (m, n)
        weights = self._sets((n, k))
        x, out = self._array((m, k)), random_array(self.backend, out_shape, out_dtype)
        out_bytes = out_dtype.itemsize * math.prod(out_shape)

        def launch(i: int) -> None:
            weight = weights[i % len(weights)]
            if name == "gate_up":
                self.backend.linear_silu_and_mul(out, x, weight)
            else:
                self.backend.linear(out, x, weight, accumulate=accumulate)

        return Case(
            f"{name} {n}x{k}, {m} rows",
            launch,
            len(weights),
            bytes_read=item * (n * k + m * k) + (out_bytes if accumulate else 0),
            bytes_written=out_bytes,
            flops=2 * m * n * k,
        )

    def _attention(self, num_seqs: int, length: int, query_len: int) -> Case:
        """The last query_len tokens of sequences of `length` tokens, which lie in blocks all over the cache."""
        model, item = self.model, self.backend.dtype.itemsize
        window = model.sliding_window or length
        num_tokens, q_size = num_seqs * query_len, model.num_heads * model.head_dim
        num_blocks = num_seqs * ceil_div(length, self.block_size)
        num_keys_read = num_seqs * min(length, window + query_len - 1)
        kv_bytes = 2 * item * model.num_kv_heads * model.head_dim * num_keys_read
        num_layers = self._num_sets(kv_bytes)
        arena = self._arena(num_layers, num_blocks)
        block_ids = self._rng.permutation(arena.num_blocks)[:num_blocks]
        batch = self.backend.upload_batch(attention_batch(block_ids.reshape(num_seqs, -1), length, query_len))
        qkv = self._array((num_tokens, model.qkv_size))
        out = self.backend.empty((num_tokens, q_size), self.backend.dtype)
        num_products = num_seqs * int(np.minimum(np.arange(length - query_len, length) + 1, window).sum())
        return Case(
            f"{num_seqs} x {length}",
            lambda i: self.backend.paged_attention(
                out, qkv, arena, i % num_layers, batch, model.num_heads, model.sm_scale, model.sliding_window or 0
            ),
            num_layers,
            bytes_read=kv_bytes + item * num_tokens * q_size,
            bytes_written=item * num_tokens * q_size,
            flops=4 * num_products * q_size,
        )

    def _rope(self, m: int) -> Case:
        model, item = self.model, self.backend.dtype.itemsize
        arena = self._arena(1, ceil_div(m, self.block_size))
        num_positions = min(model.max_position_embeddings, 4096)
        cos_sin = self._on_device(cos_sin_table(model.rope, model.head_dim, num_positions))
        positions = self._on_device(self._rng.integers(0, num_positions, m).astype(np.int32))
        slots = self._on_device(self._rng.permutation(arena.num_blocks * self.block_size)[:m].astype(np.int32))
        norms = [self._array((model.head_dim,)) if model.qk_norm else None for _ in range(2)]
        qkvs = self._sets((m, model.qkv_size))
        return Case(
            f"{m} rows",
            lambda i: self.backend.rope_and_store_kv(
                qkvs[i % len(qkvs)], arena, 0, positions, slots, cos_sin, model.num_heads, *norms, model.rms_norm_eps
            ),
            len(qkvs),
            bytes_read=m * (item * model.qkv_size + 4 * cos_sin.shape[1]),
            bytes_written=item * m * model.qkv_size,
        )

    def _rms_norm(self, m: int) -> Case:
        hidden, item = self.model.hidden_size, self.backend.dtype.itemsize
        xs = self._float32_sets((m, hidden))
        weight, out = self._array((hidden,)), self.backend.empty((m, hidden), self.backend.dtype)
        return Case(
            f"{m} rows",
            lambda i: self.backend.rms_norm(out, xs[i % len(xs)], weight, self.model.rms_norm_eps),
            len(xs),
            bytes_read=4 * m * hidden + item * hidden,
            bytes_written=item * m * hidden,
        )

    def _embedding(self, m: int) -> Case:
        hidden, item = self.model.hidden_size, self.backend.dtype.itemsize
        weight = self._array((self.model.vocab_size, hidden))
        num_sets = self._num_sets(item * m * hidden)
        ids = [self._on_device(self._rng.integers(0, weight.shape[0], m).astype(np.int32)) for _ in range(num_sets)]
        out = self.backend.empty((m, hidden), np.float32)
        return Case(
            f"{m} rows",
            lambda i: self.backend.embedding(out, weight, ids[i % num_sets]),
            num_sets,
            bytes_read=item * m * hidden + 4 * m,
            bytes_written=4 * m * hidden,
        )

    def _sampler(self, name: str, m: int, temperature: float, top_k: int, top_p: float) -> Case:
        vocab_size = self.model.vocab_size
        logits = self._logits(m)
        rows = np.zeros(m, SAMPLING_ROW)
        rows["temperature"], rows["top_k"], rows["top_p"], rows["seed"] = temperature, top_k, top_p, np.arange(m)
        rows = self._on_device(rows)
        token_ids = self.backend.empty((m,), np.int32)
        return Case(
            f"{name}, {m} rows",
            lambda i: self.backend.sample(token_ids, logits[i % len(logits)], rows, vocab_size),
            len(logits),
            bytes_read=4 * m * vocab_size + rows.nbytes,
            bytes_written=4 * m,
        )

    def _logprobs(self, m: int) -> Case:
        vocab_size, columns = self.model.vocab_size, 1 + NUM_LOGPROBS
        logits = self._logits(m)
        token_ids = self._on_device(self._rng.integers(0, vocab_size, m).astype(np.int32))
        top_ids, ranks = self.backend.empty((m, columns), np.int32), self.backend.empty((m,), np.int32)
        top_logprobs = self.backend.empty((m, columns), np.float32)
        return Case(
            f"{NUM_LOGPROBS} best, {m} rows",
            lambda i: self.backend.logprobs(
                top_ids, top_logprobs, ranks, logits[i % len(logits)], token_ids, vocab_size
            ),
            len(logits),
            bytes_read=4 * m * vocab_size + 4 * m,
            bytes_written=m * (8 * columns + 4),
        )

    def _keep_allowed(self, m: int) -> Case:
        vocab_size = self.model.vocab_size
        logits = self._logits(m)
        rows = self._on_device(np.arange(m, dtype=np.int32))
        masks = self._on_device(np.full((m, ceil_div(vocab_size, 32)), 0x55555555, np.uint32))  # every other id
        return Case(
            f"keep_allowed, {m} rows",
            lambda i: self.backend.keep_allowed(logits[i % len(logits)], rows, masks, vocab_size),
            len(logits),
            bytes_read=masks.nbytes + rows.nbytes,
            bytes_written=4 * m * (vocab_size // 2),
        )

    def _edit_logits(self, m: int) -> Case:
        logits = self._logits(m)
        edits = np.zeros((m, EDITS_A_ROW), LOGIT_EDIT)
        edits["row"], edits["repetition_penalty"] = np.arange(m)[:, None], 1.1
        edits["token"] = self._rng.choice(self.model.vocab_size, EDITS_A_ROW, replace=False)
        edits = self._on_device(edits.reshape(-1))
        return Case(
            f"edit_logits, {EDITS_A_ROW} a row, {m} rows",
            lambda i: self.backend.edit_logits(logits[i % len(logits)], edits),
            len(logits),
            bytes_read=edits.nbytes + 4 * m * EDITS_A_ROW,
            bytes_written=4 * m * EDITS_A_ROW,
        )

    def _copy_blocks(self) -> Case:
        arena = self._arena(self.model.num_layers, 2 * NUM_COPIED_BLOCKS)
        block_ids = self._rng.permutation(arena.num_blocks)[: 2 * NUM_COPIED_BLOCKS]
        pairs = block_ids.reshape(-1, 2).astype(np.int32)
        num_bytes = NUM_COPIED_BLOCKS * arena.layout.bytes_per_block
        return Case(
            f"{NUM_COPIED_BLOCKS} blocks of {format_bytes(arena.layout.bytes_per_block)}",
            lambda i: self.backend.copy_blocks(arena, arena, pairs),
            1,
            bytes_read=num_bytes,
            bytes_written=num_bytes,
        )

    # -- arrays ------------------------------------------------------------------------------------------------

    def _num_sets(self, num_bytes: int) -> int:
        return num_cold_sets(num_bytes, self.l2_bytes)

    def _sets(self, shape: tuple[int, int]) -> list[Array]:
        return [self._array(shape) for _ in range(self._num_sets(self.backend.dtype.itemsize * shape[0] * shape[1]))]

    def _array(self, shape: tuple[int, ...]) -> Array:
        return random_array(self.backend, shape, self.backend.dtype)

    def _float32_sets(self, shape: tuple[int, int]) -> list[Array]:
        return [random_array(self.backend, shape, np.float32) for _ in range(self._num_sets(4 * shape[0] * shape[1]))]

    def _logits(self, m: int) -> list[Array]:
        return self._float32_sets((m, self.model.vocab_size))

    def _on_device(self, values: np.ndarray) -> Array:
        array = self.backend.empty(values.shape, values.dtype)
        self.backend.copy_in(array, values)
        return array

    def _arena(self, num_layers: int, num_blocks: int) -> KVArena:
        """A cache of at least num_blocks blocks, all with memory and filled."""
        layout = KVLayout.choose(
            num_layers=num_layers,
            num_kv_heads=self.model.num_kv_heads,
            block_size=self.block_size,
            head_dim=self.model.head_dim,
            dtype=self.backend.dtype,
            max_blocks=num_blocks,
        )
        arena = KVArena(layout, self.backend, num_blocks + layout.blocks_per_slab)
        while arena.num_blocks < num_blocks:
            if not arena.grow():
                raise OutOfMemoryError(f"{num_blocks} blocks of {format_bytes(layout.bytes_per_block)} don't fit")
            _fill(self.backend, arena.slabs[-1])
        return arena


def num_cold_sets(num_bytes: int, l2_bytes: int) -> int:
    """How many arrays of num_bytes launches must take turns on to find none in the L2 cache."""
    return min(MAX_SETS, ceil_div(COLD_L2_FACTOR * l2_bytes, num_bytes))


def attention_batch(block_tables: np.ndarray, length: int, query_len: int) -> Batch:
    """The last query_len tokens of sequences of `length` tokens each; block_tables [num_seqs, blocks of each]."""
    num_seqs = len(block_tables)
    num_decodes = num_seqs if query_len == 1 else 0
    return Batch(
        token_ids=np.zeros(num_seqs * query_len, np.int32),
        positions=np.tile(np.arange(length - query_len, length, dtype=np.int32), num_seqs),
        slot_mapping=np.full(num_seqs * query_len, -1, np.int32),
        query_start_loc=np.arange(num_seqs + 1, dtype=np.int32) * np.int32(query_len),
        seq_lens=np.full(num_seqs, length, np.int32),
        block_tables=np.ascontiguousarray(block_tables, np.int32),
        logits_indices=np.arange(num_seqs, dtype=np.int32),
        num_decodes=num_decodes,
        max_query_len=0 if num_decodes else query_len,
        max_seq_len=length,
    )


def random_array(backend: Backend, shape: tuple[int, ...], dtype) -> Array:
    """Normal values: zeros would draw less power, and so run faster, than what a model holds."""
    array = backend.empty(shape, dtype)
    _fill(backend, array)
    return array


def _fill(backend: Backend, array: Array) -> None:
    flat = array.reshape(-1)
    pool = _random_pool(flat.dtype)
    for start in range(0, flat.shape[0], POOL_SIZE):
        part = flat[start : start + POOL_SIZE]
        backend.copy_in(part, pool[: part.shape[0]])


@functools.cache
def _random_pool(dtype: np.dtype) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(POOL_SIZE, np.float32).astype(dtype)
