"""Frozen descriptions: what a model is (ModelConfig) and how the engine is to run it (EngineConfig)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cupaged.arguments import is_finite_number, is_int, require

BLOCK_SIZES = (8, 16, 32, 64)  # tokens a block; what the kernels are instantiated for
DEVICES = ("auto", "cuda", "cpu")
DTYPES = ("auto", "bfloat16", "float16", "float32")
SCHEDULING_POLICIES = ("fcfs", "priority")
PREEMPTION_MODES = ("auto", "recompute", "swap")


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
        """From the dictionary of a Hugging Face config.json, as transformers 4 or 5 writes it.

        Raises CheckpointError that names the key: for what cupaged does not run (architecture, activation, rope
        type, quantisation, layers that differ in kind), for a missing key and for a value of the wrong type.
        """
        from cupaged.hf_config import model_config  # which builds a ModelConfig, so it imports this module

        return model_config(config)


@dataclass(frozen=True)
class EngineConfig:
    """How to run a model. Names and defaults are vLLM's where it has them. Raises ValueError that names the option
    whose value makes no sense.

    kv_cache_memory_bytes: upper bound of the KV cache; None derives one from gpu_memory_utilization.
    gpu_memory_utilization: the share of the device's whole memory that weights, buffers and KV cache may reach.
    max_model_len: the longest prompt + output; None means the model's own limit, lowered to what fits.
    max_num_seqs: the most sequences that run at once; no more than max_num_batched_tokens ever do.
    max_num_batched_tokens: tokens a step may compute, prompts and decodes together.
    long_prefill_token_threshold: while other sequences decode, a step computes at most so many tokens of any one
        prompt: fewer make a long prompt disturb the others less, and itself take longer.
    preallocate: take the whole KV cache at the start instead of growing slab by slab, and keep it.
    idle_trim_seconds: steps give back memory of the KV cache that was not in use for so long. It is taken again when it
        is needed, but what was cached in it is forgotten. None keeps it.
    enable_prefix_caching: keep what was computed of prompts and outputs while there is room, and use it for requests
        that begin with the same tokens.
    scheduling_policy: "fcfs" serves in the order of arrival; "priority" serves lower values of a request's priority
        first, in the order of arrival among equals, and takes the memory of requests that come after.
    preemption_mode: when memory lacks, a request's KV cache is given up and computed again later ("recompute"), or kept
        in the host's memory ("swap", as long as there is room); "auto" takes what has cost less time so far.
    swap_space_bytes: host memory that swapping may take, page-locked and taken as needed. None means 4 GiB where that
        makes sense: on a GPU, or with preemption_mode "swap". 0 means none.
    async_scheduling: launch a step before the tokens of the one before it are known, so that the device need not wait
        for the host in between. Tokens are the same either way. None does so on a GPU; on the CPU it hides nothing.
    max_queue_len: the most requests that may wait; more are refused with QueueFullError. None sets no limit.
    enforce_eager: launch the kernels of every step one by one. Otherwise, on a GPU, steps that only decode, and small
        ones with prompts, are captured as CUDA graphs when batches of a size and length come: less time, some memory,
        the same results.
    debug: check the engine's books after every step, and fill freed blocks with NaN; slow.
    """

    device: str = "auto"  # of DEVICES
    dtype: str = "auto"  # of DTYPES
    block_size: int = 16
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    long_prefill_token_threshold: int = 64
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    preallocate: bool = False
    idle_trim_seconds: float | None = 300.0
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"  # of SCHEDULING_POLICIES
    preemption_mode: str = "auto"  # of PREEMPTION_MODES
    swap_space_bytes: int | None = None
    async_scheduling: bool | None = None
    max_queue_len: int | None = None
    enforce_eager: bool = False
    debug: bool = False
    seed: int | None = None  # seeds the requests that bring none; None: from the operating system

    def __post_init__(self):
        choices = {
            "device": DEVICES,
            "dtype": DTYPES,
            "block_size": BLOCK_SIZES,
            "scheduling_policy": SCHEDULING_POLICIES,
            "preemption_mode": PREEMPTION_MODES,
        }
        for name, values in choices.items():
            value = getattr(self, name)
            require(value in values, name, value, "one of " + ", ".join(map(str, values)))
        for name in ("max_num_seqs", "max_num_batched_tokens", "long_prefill_token_threshold"):
            value = getattr(self, name)
            require(is_int(value) and value >= 1, name, value, "an integer >= 1")
        length, cache = self.max_model_len, self.kv_cache_memory_bytes
        require(length is None or (is_int(length) and length >= 2), "max_model_len", length, "an integer >= 2, or None")
        require(
            cache is None or (is_int(cache) and cache >= 1), "kv_cache_memory_bytes", cache, "an integer >= 1, or None"
        )
        swap = self.swap_space_bytes
        require(swap is None or (is_int(swap) and swap >= 0), "swap_space_bytes", swap, "an integer >= 0, or None")
        if self.preemption_mode == "swap" and swap == 0:
            raise ValueError("swap_space_bytes must be more than 0 for preemption_mode 'swap'; got 0")
        idle = self.idle_trim_seconds
        require(idle is None or (is_finite_number(idle) and idle >= 0), "idle_trim_seconds", idle, ">= 0, or None")
        ahead = self.async_scheduling
        require(ahead is None or isinstance(ahead, bool), "async_scheduling", ahead, "True, False or None")
        queue = self.max_queue_len
        require(queue is None or (is_int(queue) and queue >= 1), "max_queue_len", queue, "an integer >= 1, or None")
        share = self.gpu_memory_utilization
        require(is_finite_number(share) and 0 < share <= 1, "gpu_memory_utilization", share, "in (0, 1]")
        require(self.seed is None or is_int(self.seed), "seed", self.seed, "an integer, or None")
