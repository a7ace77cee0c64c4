"""The operations that a decoder is written in. `reference` and `cuda` implement them with the same signatures.

Arrays are the backend's own (numpy.ndarray, cupy.ndarray), C-contiguous unless a docstring says otherwise. An
operation writes into the arrays it is given and allocates nothing, synchronises nothing and reads nothing back, so
that a forward pass can be captured into a graph. `dtype` below is the backend's activation and KV dtype; sums are
taken in float32 whatever it is. No operation accepts overlapping input and output unless its docstring says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from cupaged.engine.batch import Batch
from cupaged.memory.arena import KVArena

Array = Any

MAX_TOP_TOKENS = 128  # the largest k of Backend.logprobs: it takes time in proportion to k

# One row's sampling parameters, uploaded as they are; sampler.cu has the same struct.
SAMPLING_ROW = np.dtype(
    [
        ("temperature", np.float32),  # > 0; 0 means greedy
        ("top_p", np.float32),  # (0, 1]
        ("min_p", np.float32),  # [0, 1]
        ("top_k", np.int32),  # 0 keeps all
        ("seed", np.uint64),  # the Philox key
        ("counter", np.uint64),  # the Philox counter: how many tokens the sequence has drawn
    ]
)  # 32 bytes, no padding

# One logit and what edit_logits does to it; logits.cu has the same struct.
LOGIT_EDIT = np.dtype(
    [
        ("row", np.int32),
        ("token", np.int32),
        ("bias", np.float32),  # added; -inf forbids the token
        ("repetition_penalty", np.float32),  # > 0; 1 changes nothing
        ("penalty", np.float32),  # subtracted: presence_penalty + frequency_penalty * count
    ]
)  # 20 bytes, no padding


class Rope(NamedTuple):
    """What rotates heads, and norms them before: `rope_and_store_kv`'s arguments of these names."""

    cos_sin: Array
    q_norm: Array | None = None
    k_norm: Array | None = None
    eps: float = 0.0


class Backend(Protocol):
    name: str  # "cuda" | "cpu"
    description: str  # for people: "NVIDIA H100 80GB HBM3 (driver 580.159)"
    dtype: np.dtype
    has_graphs: bool  # whether `capture` is there, and worth it

    # -- memory --------------------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype) -> Array:
        """An uninitialised array. Raises OutOfMemoryError that says what was wanted and what is free."""

    def empty_host(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        """An uninitialised array in host memory that kernels can address (page-locked), for a swap space.

        It is given back when the array goes; taking and giving it back are slow. Raises OutOfMemoryError.
        """

    def copy_in(self, dst: Array, src: np.ndarray) -> None:
        """Copy a host array to dst (same shape), converting to dst's dtype. src may be reused on return."""

    def copy(self, dst: Array, src: Array) -> None:
        """dst[...] = src, of the same shape and dtype, both arrays of the backend."""

    def to_host(self, src: Array) -> np.ndarray:
        """A host copy; waits for everything launched before."""

    def fetch(self, src: Array) -> Callable[[], np.ndarray]:
        """Start a host copy of src (C-contiguous) as what is launched before leaves it. Returns what gives it, once:
        it waits for the copy, not for what is launched later."""

    def address(self, array: Array) -> int:
        """The address of its first element; `array` may come from empty_host as well."""

    def memory_info(self) -> tuple[int, int]:
        """(free, total) bytes of the memory that arrays come from."""

    def compile(self, config) -> None:
        """Compile the kernels that ModelConfig `config` needs and the cache lacks. It asks nothing of the device, so
        that it may run in another thread while the weights are copied."""

    def reserve(self, config, max_num_tokens: int, max_num_seqs: int, max_model_len: int) -> None:
        """Take the scratch memory that the operations need for ModelConfig `config` and steps of these sizes, and
        load the kernels for them. Called once, before the first step."""

    def upload_batch(self, batch: Batch) -> Batch:
        """The batch with its arrays on the device. What it returns is valid until the next call. Arrays of batches
        whose shapes agree lie in the same places."""

    def capture(self, function: Callable[[], object]) -> Callable[[], None]:
        """Record the operations that `function` calls, of which none is carried out; returns what carries out all of
        them in one launch, as often as it is called, on what their arrays hold then. The arrays must live on.

        function allocates nothing, copies nothing from or to the host, waits for nothing, and has run before. Raises
        RuntimeError, or MemoryError where there is no room for the record.
        """

    def close(self) -> None:
        """Give the scratch memory back."""

    # -- the cache -----------------------------------------------------------------------------------------

    def copy_blocks(self, dst: KVArena, src: KVArena, pairs: np.ndarray) -> None:
        """Copy blocks, all layers, K and V: pairs [n, 2] int32, in the host's memory, are ids of a block of `src` and
        of its copy in `dst`.

        The arenas' layouts agree, except that their slabs may hold different numbers of blocks. dst may be src
        (copy-on-write); the slabs of one may lie in host memory (swapping). Destinations are distinct and, when dst is
        src, no sources.
        """

    # -- the forward pass ----------------------------------------------------------------------------------

    def for_each_layer(self, layers: Sequence[Any], arena: KVArena, run: Callable[[int, Any], None]) -> None:
        """run(i, layers[i]) for each i, in order.

        run does nothing but call operations, the same ones for each i, with the same arguments but for i, which is
        the layer of `arena`, and the attributes of layers[i]: arrays or None, which stay where they are. So it may be
        called for some only, and what it launches launched for the others.
        """

    def embedding(self, out: Array, weight: Array, ids: Array) -> None:
        """out[i] = weight[ids[i]]: weight [rows, hidden] dtype or float32, ids [n] int32, out [n, hidden] float32. Also
        gathers the rows of the residual whose logits are wanted."""

    def take_tokens(self, token_ids: Array, drawn: Array) -> None:
        """token_ids[i] = drawn[~token_ids[i]] where token_ids[i] is negative; both [n], [m] int32, in place.

        So a batch can be uploaded before its tokens are known: ~j stands for row j of the step before, whose draws
        (sample) are `drawn`, -1 among them perhaps.
        """

    def rms_norm(self, out: Array, x: Array, weight: Array, eps: float) -> None:
        """out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight; x [n, hidden] float32, weight [hidden] and out [n, hidden]
        dtype. Rounds once."""

    def linear(
        self, out: Array, x: Array, weight: Array, bias: Array | None = None, *, accumulate: bool = False
    ) -> None:
        """out = x @ weight^T + bias, or with accumulate out += x @ weight^T + bias. Rounds once.

        x [m, k], weight [n, k] and bias [n] dtype, out [m, n] dtype or float32, float32 to accumulate.
        """

    def linear_silu_and_mul(self, out: Array, x: Array, weight: Array) -> None:
        """out = silu(x @ gate^T) * (x @ up^T), where silu(g) = g / (1 + exp(-g)). Rounds once.

        x [m, k], out [m, intermediate] and weight [2 * intermediate, k] dtype; rows 2i and 2i + 1 of weight are rows i
        of gate and up.
        """

    def rms_norm_linear(
        self, out: Array, x: Array, norm: Array, eps: float, normed: Array, weight: Array, bias: Array | None = None
    ) -> None:
        """`linear` of `rms_norm`: out = rms_norm(x, norm, eps) @ weight^T + bias, where x is float32.

        normed [n, hidden] dtype: memory for the norm, which may be there afterwards.
        """

    def rms_norm_linear_silu_and_mul(
        self, out: Array, x: Array, norm: Array, eps: float, normed: Array, weight: Array
    ) -> None:
        """`linear_silu_and_mul` of `rms_norm`, as in rms_norm_linear."""

    def rope_and_store_kv(
        self,
        qkv: Array,
        arena: KVArena,
        layer: int,
        positions: Array,
        slot_mapping: Array,
        cos_sin: Array,
        num_heads: int,
        q_norm: Array | None = None,
        k_norm: Array | None = None,
        eps: float = 0.0,
    ) -> None:
        """Rotate q and k by their positions, q in place, and write k and v to their slots.

        qkv [n, (num_heads + 2 * num_kv_heads) * head_dim]: the query heads (rotated in place), the key heads and
        the value heads (both left as they are, or rotated in place: unspecified). positions, slot_mapping [n] int32;
        slot -1 writes nothing. cos_sin [max_positions, rotary_dim] float32: row p holds cos(p * inv_freq_i) for
        i < rotary_dim/2, then the sines. Pairs are (i, i + rotary_dim/2) (the Hugging Face "half" layout);
        dimensions from rotary_dim on pass through. q_norm, k_norm [head_dim]: when given, each head is first
        RMS-normalised with eps and this weight (Qwen3). Arithmetic in float32, one rounding at the store.
        """

    def paged_attention(
        self,
        out: Array,
        qkv: Array,
        arena: KVArena,
        layer: int,
        batch: Batch,
        num_heads: int,
        sm_scale: float,
        window: int = 0,
    ) -> None:
        """Causal attention of the step's tokens over the cache, which holds this step's keys and values already.

        out [num_tokens, num_heads * head_dim]; qkv as above, of which only the query heads are read. A token at
        position p attends to positions max(0, p - window + 1) .. p, all of 0 .. p when window is 0. Query head h
        reads key-value head h // (num_heads // num_kv_heads). Rows of sequences with seq_len 0 become zeros.
        """

    def rope_and_attend(
        self,
        out: Array,
        qkv: Array,
        arena: KVArena,
        layer: int,
        batch: Batch,
        num_heads: int,
        sm_scale: float,
        window: int,
        rope: Rope,
    ) -> None:
        """`rope_and_store_kv` of the step's tokens, then `paged_attention`. qkv may stay as it is."""

    # -- sampling ------------------------------------------------------------------------------------------
    #
    # What a request asks of its logits is done in vLLM's order: its own logits_processors, which get the raw logits;
    # keep_allowed for allowed_token_ids; then edit_logits, whose bias holds bad_words and min_tokens (-inf) and
    # logit_bias, and whose penalties follow: repetition, then frequency and presence; then sample. Log probabilities
    # are those of the raw logits.

    def keep_allowed(self, logits: Array, rows: Array, masks: Array, vocab_size: int) -> None:
        """logits[rows[i], id] = -inf for each id below vocab_size whose bit in masks[i] is 0.

        logits [m, >= vocab_size] float32, in place; rows [k] int32; masks [k, ceil(vocab_size / 32)] uint32: id i has
        bit i % 32 of word i // 32.
        """

    def edit_logits(self, logits: Array, edits: Array) -> None:
        """For each of edits [n] LOGIT_EDIT, on l = logits[row, token]:

            l += bias;  l = l / repetition_penalty if l > 0 else l * repetition_penalty;  l -= penalty

        logits [m, vocabulary] float32, in place. No logit is named twice. A bias of -inf gives -inf whatever l was,
        infinity and NaN included.
        """

    def sample(self, token_ids: Array, logits: Array, rows: Array, vocab_size: int, *, greedy: bool = False) -> None:
        """Draw one token a row. logits [m, >= vocab_size] float32 (ids from vocab_size on are never drawn), rows [m]
        SAMPLING_ROW on the device, token_ids [m] int32 out. greedy: all rows have temperature 0, so that nothing is
        launched for others.

        temperature 0: the largest logit, the lowest id on a tie. Otherwise, in this order: logits / temperature,
        min_p, top_k, top_p over what is left; ties with the last kept token are kept. The draw is by inverse CDF in
        id order with one 64-bit Philox4x32-10 number from (seed, counter), over probabilities in fixed point, so that
        it doesn't depend on the order of summation. NaN logits count as -inf; a row without a finite logit gives
        token id -1.
        """

    def logprobs(
        self, top_ids: Array, top_logprobs: Array, ranks: Array, logits: Array, token_ids: Array, vocab_size: int
    ) -> None:
        """Log-softmax of the raw logits. top_ids, top_logprobs [m, 1 + k] int32 / float32, k <= MAX_TOP_TOKENS: column
        0 for token_ids[m], columns 1..k the k most likely ids in order (the lowest id first on a tie); ranks [m]
        int32: 1 + how many tokens are more likely than token_ids[m]. logits [m, >= vocab_size] float32."""
