"""Block tables: which blocks hold a sequence's keys and values."""

from __future__ import annotations

from cupaged.engine.block_pool import BlockPool
from cupaged.engine.sequence import Sequence


class BlockManager:
    def __init__(self, pool: BlockPool, block_size: int):
        self.pool = pool
        self.block_size = block_size  # tokens

    def allocate_slots(self, seq: Sequence, num_tokens: int) -> bool:
        """Make room for the next `num_tokens` tokens of `seq`; False, and nothing taken, when the pool is full.

        |<-- num_cached_tokens -->|<-- num_tokens -->|
        |<-- blocks in seq.block_table -->|<- taken ->|
        """
        missing = -(-(seq.num_cached_tokens + num_tokens) // self.block_size) - len(seq.block_table)
        if missing <= 0:
            return True
        block_ids = self.pool.allocate(missing)
        if block_ids is None:
            return False
        seq.block_table.extend(block_ids)
        return True

    def free(self, seq: Sequence) -> None:
        """Give up the cache of `seq`, its last block first: what comes late in a sequence is missed least."""
        block_table, seq.block_table, seq.num_cached_tokens = seq.block_table, [], 0
        self.pool.free(reversed(block_table))
