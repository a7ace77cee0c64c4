"""What it costs to take a sequence's memory away and give it back: a model, not a measurement."""

from __future__ import annotations

from .step_time import FLOPS, KV_BYTES_PER_TOKEN, NUM_PARAMETERS

NUM_LAYERS = 40
BYTES_PER_S = 25e9  # of PCIe 4.0 x16, one way
COPY_SECONDS = 5e-6  # that a copy takes besides its bytes


def recompute_seconds(num_tokens: int) -> float:
    return num_tokens * 2 * NUM_PARAMETERS / FLOPS


def swap_seconds(num_tokens: int, block_size: int, copies_per_block: int = 2 * NUM_LAYERS) -> float:
    """Out and in again. copies_per_block: each a transfer of its own, in the paper for each layer's K and V."""
    num_blocks = -(-num_tokens // block_size)
    num_bytes = num_blocks * block_size * KV_BYTES_PER_TOKEN
    return 2 * (num_blocks * copies_per_block * COPY_SECONDS + num_bytes / BYTES_PER_S)


def batched_swap_seconds(num_tokens: int, block_size: int) -> float:
    """As cupaged copies: one launch for all blocks and layers each way."""
    num_bytes = -(-num_tokens // block_size) * block_size * KV_BYTES_PER_TOKEN
    return 2 * (COPY_SECONDS + num_bytes / BYTES_PER_S)
