"""The operations in NumPy float32: what runs where there is no GPU, and what the kernels are compared with.

Matrix products go to the BLAS that NumPy brings. Prompts are computed whole arrays at a time: the only Python loops
are over sequences and over tiles of queries.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cupaged.backends import sampling_reference
from cupaged.backends.base import Rope
from cupaged.engine.batch import Batch
from cupaged.errors import OutOfMemoryError
from cupaged.memory.arena import KVArena, KVLayout

# Up to this many rows a matrix product is done row by row: BLAS's gemv streams the weights at the memory's speed,
# its gemm first copies them into panels. Measured on two Zen 4 cores: 2 rows 0.38 ms against 0.75 ms (3072 x 576).
MAX_GEMV_ROWS = 4

# Elements of one tile's score matrix [num_heads, queries, keys]: 8 MB, which stay in the last cache between the first
# product, the softmax and the second product, and don't grow with the square of the prompt.
TILE_SCORES = 1 << 21


class ReferenceBackend:
    """Backend over numpy.ndarray; see cupaged.backends.base for what each operation computes."""

    name = "cpu"
    dtype = np.dtype(np.float32)
    has_graphs = False

    def __init__(self):
        self.description = f"the CPU ({_cpu_model()}, {_num_cpus()} cores)"
        self._uploaded: Batch | None = None
        self._spans: dict[int, list[_Span]] = {}  # window -> the spans of the uploaded batch
        self._gathered = [np.empty(0, self.dtype), np.empty(0, self.dtype)]  # K and V; kept, as fresh pages are slow

    # -- memory --------------------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        wanted = math.prod(shape) * np.dtype(dtype).itemsize
        free, _ = self.memory_info()
        if wanted <= free:
            try:
                return np.empty(shape, dtype)
            except MemoryError:
                pass
        raise OutOfMemoryError(
            f"wanted {wanted / 1e9:.2f} GB for an array {tuple(shape)}, {free / 1e9:.2f} GB are free: lower "
            "max_model_len, max_num_batched_tokens or kv_cache_memory_bytes, or take a smaller model"
        )

    def empty_host(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        return self.empty(shape, dtype)

    def copy_in(self, dst: np.ndarray, src: np.ndarray) -> None:
        if dst.shape != src.shape:
            raise ValueError(f"src: expected shape {dst.shape}; got {src.shape}")
        np.copyto(dst, src, casting="unsafe")

    def copy(self, dst: np.ndarray, src: np.ndarray) -> None:
        self.copy_in(dst, src)

    def to_host(self, src: np.ndarray) -> np.ndarray:
        return src.copy()

    def fetch(self, src: np.ndarray) -> Callable[[], np.ndarray]:
        copied = src.copy()
        return lambda: copied

    def address(self, array: np.ndarray) -> int:
        return array.ctypes.data

    def memory_info(self) -> tuple[int, int]:
        return _memory_info()

    def compile(self, config) -> None:
        pass

    def reserve(self, config, max_num_tokens: int, max_num_seqs: int, max_model_len: int) -> None:
        pass  # NumPy's temporaries come from the heap

    def upload_batch(self, batch: Batch) -> Batch:
        arrays = {name: value.copy() for name, value in vars(batch).items() if isinstance(value, np.ndarray)}
        self._uploaded = replace(batch, **arrays)
        self._spans = {}
        return self._uploaded

    def close(self) -> None:
        self._uploaded, self._spans = None, {}
        self._gathered = [np.empty(0, self.dtype), np.empty(0, self.dtype)]

    # -- the cache -----------------------------------------------------------------------------------------

    def copy_blocks(self, dst: KVArena, src: KVArena, pairs: np.ndarray) -> None:
        src_slabs, src_blocks = _slab_and_index(pairs[:, 0], src.layout)
        dst_slabs, dst_blocks = _slab_and_index(pairs[:, 1], dst.layout)
        for src_slab, dst_slab in set(zip(src_slabs.tolist(), dst_slabs.tolist(), strict=True)):
            here = (src_slabs == src_slab) & (dst_slabs == dst_slab)
            dst.slabs[dst_slab][:, :, dst_blocks[here]] = src.slabs[src_slab][:, :, src_blocks[here]]

    # -- the forward pass ----------------------------------------------------------------------------------

    def for_each_layer(self, layers: Sequence[Any], arena: KVArena, run: Callable[[int, Any], None]) -> None:
        for i, layer in enumerate(layers):
            run(i, layer)

    def embedding(self, out, weight, ids) -> None:
        out[...] = weight[ids]

    def take_tokens(self, token_ids, drawn) -> None:
        unknown = token_ids < 0
        token_ids[unknown] = drawn[~token_ids[unknown]]

    def rms_norm(self, out, x, weight, eps: float) -> None:
        np.square(x, out=out)
        np.multiply(x, _inverse_rms(out, eps), out=out)
        out *= weight

    def linear(self, out, x, weight, bias=None, *, accumulate: bool = False) -> None:
        products = np.empty_like(out) if accumulate else out
        if x.shape[0] <= MAX_GEMV_ROWS:
            np.matmul(x[:, None], weight.T, out=products[:, None])  # a stack of vector-matrix products
        else:
            np.matmul(x, weight.T, out=products)
        if bias is not None:
            products += bias
        if accumulate:
            out += products

    @np.errstate(over="ignore")  # exp(-gate) = inf is silu = 0
    def linear_silu_and_mul(self, out, x, weight) -> None:
        gate_up = np.empty((x.shape[0], weight.shape[0]), self.dtype)
        self.linear(gate_up, x, weight)
        gate, up = gate_up[:, 0::2], gate_up[:, 1::2]
        np.negative(gate, out=out)
        np.exp(out, out=out)
        out += 1
        np.divide(gate, out, out=out)
        out *= up

    def rms_norm_linear(self, out, x, norm, eps: float, normed, weight, bias=None) -> None:
        self.rms_norm(normed, x, norm, eps)
        self.linear(out, normed, weight, bias)

    def rms_norm_linear_silu_and_mul(self, out, x, norm, eps: float, normed, weight) -> None:
        self.rms_norm(normed, x, norm, eps)
        self.linear_silu_and_mul(out, normed, weight)

    def rope_and_store_kv(
        self, qkv, arena: KVArena, layer: int, positions, slot_mapping, cos_sin, num_heads: int,
        q_norm=None, k_norm=None, eps: float = 0.0,
    ) -> None:  # fmt: skip
        layout = arena.layout
        num_kv_heads, head_dim = layout.num_kv_heads, layout.head_dim
        n = qkv.shape[0]
        heads = qkv.reshape(n, num_heads + 2 * num_kv_heads, head_dim)
        q, k = heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads]
        for part, weight in ((q, q_norm), (k, k_norm)):
            if weight is not None:
                self.rms_norm(part, part.copy(), weight, eps)

        half = cos_sin.shape[1] // 2
        table = cos_sin[positions, None]
        cos, sin = table[..., :half], table[..., half:]
        qk = heads[:, : num_heads + num_kv_heads]
        first, second = qk[..., :half], qk[..., half : 2 * half]
        turned = first * sin + second * cos
        first[...] = first * cos - second * sin
        second[...] = turned

        kv = heads[:, num_heads:].reshape(n, 2, num_kv_heads, head_dim)
        block, offset = np.divmod(slot_mapping, layout.block_size)
        slab_of, index = _slab_and_index(block, layout)
        for slab in set(slab_of.tolist()) - {-1}:  # slot -1 lies in block -1, in slab -1
            here = slab_of == slab
            arena.slabs[slab][layer][:, index[here], :, offset[here]] = kv[here]

    def paged_attention(
        self, out, qkv, arena: KVArena, layer: int, batch: Batch, num_heads: int, sm_scale: float, window: int = 0
    ) -> None:
        n, head_dim = qkv.shape[0], arena.layout.head_dim
        q = qkv.reshape(n, -1, head_dim)[:, :num_heads]
        out = out.reshape(n, num_heads, head_dim)
        for span in self._spans_of(batch, arena.layout, window):
            if span.seq_len == 0:
                out[span.first : span.last] = 0
                continue
            keys, values = (self._gather(span, arena, layer, part) for part in (0, 1))
            tile = max(1, TILE_SCORES // (num_heads * keys.shape[1]))
            for first in range(span.first, span.last, tile):
                last = min(first + tile, span.last)
                position = span.seq_len - span.last + first  # of the tile's first query
                begin = max(0, position - window + 1) if window else 0  # the first key that one of its queries sees
                end = position + last - first
                seen = slice(begin - span.first_key, end - span.first_key)
                hidden_to_first = position - window - begin if window else None
                _attend(out[first:last], q[first:last] * sm_scale, keys[:, seen], values[:, seen], hidden_to_first)

    def rope_and_attend(
        self,
        out,
        qkv,
        arena: KVArena,
        layer: int,
        batch: Batch,
        num_heads: int,
        sm_scale: float,
        window: int,
        rope: Rope,
    ) -> None:
        tokens = batch.positions, batch.slot_mapping
        self.rope_and_store_kv(qkv, arena, layer, *tokens, rope.cos_sin, num_heads, *rope[1:])
        self.paged_attention(out, qkv, arena, layer, batch, num_heads, sm_scale, window)

    # -- sampling ------------------------------------------------------------------------------------------

    def keep_allowed(self, logits, rows, masks, vocab_size: int) -> None:
        sampling_reference.keep_allowed(logits, rows, masks, vocab_size)

    def edit_logits(self, logits, edits) -> None:
        sampling_reference.edit_logits(logits, edits)

    def sample(self, token_ids, logits, rows, vocab_size: int, *, greedy: bool = False) -> None:
        sampling_reference.sample(token_ids, logits, rows, vocab_size)

    def logprobs(self, top_ids, top_logprobs, ranks, logits, token_ids, vocab_size: int) -> None:
        sampling_reference.logprobs(top_ids, top_logprobs, ranks, logits, token_ids, vocab_size)

    def _spans_of(self, batch: Batch, layout: KVLayout, window: int) -> list[_Span]:
        """The batch's spans; those of the uploaded batch are kept for its other layers."""
        if batch is not self._uploaded:
            return _spans(batch, layout, window)
        if window not in self._spans:
            self._spans[window] = _spans(batch, layout, window)
        return self._spans[window]

    def _gather(self, span: _Span, arena: KVArena, layer: int, part: int) -> np.ndarray:
        """K (part 0) or V (part 1) of one sequence, [num_kv_heads, seq_len - first_key, head_dim], a head's tokens in
        a run. Valid until the next call for this part."""
        layout = arena.layout
        shape = (layout.num_kv_heads, span.num_blocks, layout.block_size * layout.head_dim)
        size = math.prod(shape)
        if self._gathered[part].size < size:
            self._gathered[part] = np.empty(size, layout.dtype)
        gathered = self._gathered[part][:size].reshape(shape)
        for slab, which, rows in span.pieces:
            runs = arena.slabs[slab][layer, part].reshape(-1, shape[2])
            if len(span.pieces) == 1:
                runs.take(rows, axis=0, out=gathered, mode="clip")  # any other mode goes through a copy
            else:
                gathered[:, which] = runs.take(rows, axis=0)
        return gathered.reshape(shape[0], -1, layout.head_dim)[:, : span.seq_len - span.first_key]


@dataclass
class _Span:
    """One sequence's part of a step: its query rows and where its keys and values lie."""

    first: int  # its query tokens are rows first .. last - 1 of the step
    last: int
    seq_len: int
    first_key: int  # position of the first key of its first block; with a window, blocks before it are not read
    num_blocks: int
    pieces: list[tuple[int, np.ndarray, np.ndarray]]  # slab, which of the blocks, their [num_kv_heads, blocks] rows


def _spans(batch: Batch, layout: KVLayout, window: int) -> list[_Span]:
    spans = []
    starts, seq_lens = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
    heads = np.arange(layout.num_kv_heads)[:, None]
    for i, seq_len in enumerate(seq_lens):
        first, last = starts[i], starts[i + 1]
        first_position = seq_len - (last - first)
        first_block = max(0, first_position - window + 1) // layout.block_size if window else 0
        blocks = batch.block_tables[i, first_block : -(-seq_len // layout.block_size)]
        slabs, index = _slab_and_index(blocks, layout)
        rows = index * layout.num_kv_heads + heads  # a slab's part of a layer is [blocks * num_kv_heads] runs
        places = ((slab, np.flatnonzero(slabs == slab)) for slab in np.unique(slabs))
        pieces = [(slab, which, rows[:, which]) for slab, which in places]
        spans.append(_Span(first, last, seq_len, first_block * layout.block_size, len(blocks), pieces))
    return spans


def _slab_and_index(block_ids: np.ndarray, layout: KVLayout) -> tuple[np.ndarray, np.ndarray]:
    """Where blocks lie: the number of the slab, and the place in it."""
    return block_ids >> layout.slab_shift, block_ids & (layout.blocks_per_slab - 1)


def _attend(out, q, keys, values, hidden_to_first: int | None) -> None:
    """Softmax attention of consecutive queries, of which the last sees the last key.

    out, q [queries, num_heads, head_dim], q scaled; keys, values [num_kv_heads, num_keys, head_dim]. Query j sees
    the keys up to num_keys - queries + j; with a window, not those up to hidden_to_first + j either.
    """
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, num_keys, _ = keys.shape
    group = num_heads // num_kv_heads
    grouped = q.reshape(num_queries, num_kv_heads, group, head_dim).transpose(1, 2, 0, 3)
    # One product of a matrix for the whole group; for one query, of vectors (gemv, as in linear).
    rows = grouped if num_queries == 1 else grouped.reshape(num_kv_heads, 1, group * num_queries, head_dim)
    scores = np.matmul(rows, keys[:, None].swapaxes(2, 3))

    if num_queries > 1:
        by_query = scores.reshape(num_kv_heads, group, num_queries, num_keys)
        later = ~np.tri(num_queries, dtype=bool)  # among the last keys, those of the tile itself
        np.copyto(by_query[..., num_keys - num_queries :], -np.inf, where=later)
        if hidden_to_first is not None and hidden_to_first + num_queries > 0:
            too_old = np.tri(num_queries, hidden_to_first + num_queries, hidden_to_first, dtype=bool)
            np.copyto(by_query[..., : too_old.shape[1]], -np.inf, where=too_old)

    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    attended = np.matmul(scores, values[:, None])
    attended /= scores.sum(axis=-1, keepdims=True)
    attended = attended.reshape(num_kv_heads, group, num_queries, head_dim).transpose(2, 0, 1, 3)
    out[...] = attended.reshape(num_queries, num_heads, head_dim)


def _inverse_rms(squares: np.ndarray, eps: float) -> np.ndarray:
    """1 / sqrt(mean + eps) along the last axis, which stays with size 1."""
    mean = np.add.reduce(squares, axis=-1, keepdims=True) / np.float32(squares.shape[-1])
    return 1 / np.sqrt(mean + np.float32(eps))


def _memory_info() -> tuple[int, int]:
    """(available, total) bytes of the machine's memory."""
    try:
        with open("/proc/meminfo") as lines:
            kilobytes = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
        return kilobytes["MemAvailable"] * 1024, kilobytes["MemTotal"] * 1024
    except (OSError, KeyError):
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    except OSError:
        return "CPU"


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
