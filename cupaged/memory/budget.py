"""How much memory the KV cache may take, and how long sequences may then get."""

from __future__ import annotations

import logging

from cupaged.backends.base import Backend
from cupaged.config import EngineConfig, ModelConfig
from cupaged.errors import OutOfMemoryError
from cupaged.memory.arena import KVLayout

# Without an option that says so, a cache in the host's memory takes no more than this, and half of what is free.
CPU_KV_CACHE_BYTES = 4 << 30

# As vLLM's: eight requests of 4,096 tokens to Llama-3.1-8B.
SWAP_SPACE_BYTES = 4 << 30

logger = logging.getLogger(__name__)


def kv_cache_bytes(config: EngineConfig, backend: Backend) -> int:
    """The most bytes that the KV cache may reach, now that weights and buffers are in place.

    Raises OutOfMemoryError when kv_cache_memory_bytes is more than is free, or when nothing is left of
    gpu_memory_utilization.
    """
    free, total = backend.memory_info()
    wanted = config.kv_cache_memory_bytes
    if wanted is not None:
        if wanted > free:
            raise OutOfMemoryError(
                f"the KV cache may take {format_bytes(wanted)}, but {format_bytes(free)} are free: lower "
                "kv_cache_memory_bytes (--kv-cache-memory)"
            )
        return wanted
    if backend.name == "cpu":
        return min(CPU_KV_CACHE_BYTES, free // 2)
    left = min(int(total * config.gpu_memory_utilization) - (total - free), free)
    if left <= 0:
        raise OutOfMemoryError(
            f"no memory is left for the KV cache: {format_bytes(total - free)} of {format_bytes(total)} are in use, "
            f"which is all that gpu_memory_utilization={config.gpu_memory_utilization} allows: raise it "
            "(--gpu-memory-utilization), or close other programs on this GPU"
        )
    return left


def swap_space_bytes(config: EngineConfig, backend: Backend) -> int:
    """The most bytes of host memory that blocks of preempted requests may take; 0 when there is to be no swapping.

    By default there is none on the CPU, whose KV cache is in the host's memory already: it could be larger instead.
    """
    if config.preemption_mode == "recompute":
        return 0
    if config.swap_space_bytes is not None:
        return config.swap_space_bytes
    return SWAP_SPACE_BYTES if backend.name != "cpu" or config.preemption_mode == "swap" else 0


def num_kv_blocks(max_bytes: int, bytes_per_block: int) -> int:
    """How many blocks fit into the KV cache. Raises OutOfMemoryError when not even one does."""
    if max_bytes < bytes_per_block:
        raise OutOfMemoryError(
            f"the KV cache may take {format_bytes(max_bytes)}, but one block needs {format_bytes(bytes_per_block)}: "
            "raise kv_cache_memory_bytes (--kv-cache-memory) or lower block_size (--block-size)"
        )
    return max_bytes // bytes_per_block


def wanted_max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """The longest sequence to make ready for, before it is known what the KV cache holds.

    Raises ValueError when max_model_len is beyond the model's own limit.
    """
    limit = model.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ValueError(f"max_model_len must be at most the model's {limit} positions; got {config.max_model_len}")
    return config.max_model_len or limit


def fit_max_model_len(config: EngineConfig, model: ModelConfig, layout: KVLayout, max_blocks: int) -> int:
    """The longest sequence that a cache of `max_blocks` holds, so that each one, alone, always fits.

    A max_model_len that was not given is lowered to it, with a warning. Raises OutOfMemoryError when the one that
    was given doesn't fit.
    """
    wanted, capacity = wanted_max_model_len(config, model), max_blocks * layout.block_size
    if wanted <= capacity:
        return wanted
    need, have = format_bytes(wanted * layout.bytes_per_token), format_bytes(capacity * layout.bytes_per_token)
    if config.max_model_len is not None:
        raise OutOfMemoryError(
            f"max_model_len={wanted} needs {need} of KV cache, but it has {have}: lower max_model_len "
            f"(--max-model-len) to {capacity}, or give the cache more by kv_cache_memory_bytes (--kv-cache-memory) "
            "or gpu_memory_utilization (--gpu-memory-utilization)"
        )
    logger.warning(
        f"max_model_len is lowered from {wanted} to {capacity}: the KV cache has {have}, {need} would be needed"
    )
    return capacity


def format_bytes(count: int) -> str:
    """For people: "1.50 GiB", "20.0 MiB", "3.0 KiB"."""
    for unit, name, digits in ((1 << 30, "GiB", 2), (1 << 20, "MiB", 1)):
        if abs(count) >= unit:
            return f"{count / unit:.{digits}f} {name}"
    return f"{count / 1024:.1f} KiB"
