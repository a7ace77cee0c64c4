"""What an engine tells of itself: its state now, and its counts since it began."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cupaged.engine.block_pool import BlockPool
from cupaged.engine.sequence import Request

if TYPE_CHECKING:
    from cupaged.engine.engine import Engine


@dataclass(frozen=True)
class EngineStats:
    """The engine's state now, and its counts since it began. Blocks are KV cache blocks."""

    num_running: int
    num_waiting: int
    max_blocks: int  # the cache's limit
    num_blocks: int  # of which this many have memory
    num_used_blocks: int
    num_free_blocks: int  # have memory and are not used by any sequence
    num_cached_blocks: int  # of the free ones: what they hold can still be found
    peak_used_blocks: int
    num_slabs: int
    kv_cache_bytes: int  # of all slabs
    num_unfilled_slots: int  # token slots in used blocks that hold no token: what paging wastes
    mean_waste: float  # their share of the used blocks' slots, over all steps
    num_blocks_saved: int  # how many more would be in use if none were shared
    mean_sharing: float  # their share of what would be in use then, over all steps
    num_steps: int
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompts' tokens: found in the prefix cache
    num_output_tokens: int
    num_copies: int  # blocks copied because one of several holders wrote into them
    num_evictions: int  # blocks whose findable content had to go
    num_preemptions: int
    num_swaps: int  # of the preemptions: what the request had computed was swapped
    num_tokens_lost: int  # by the other preemptions: computed tokens that have to be computed again
    num_swapped_blocks: int  # in the swap space now
    swap_space_bytes: int  # of its slabs
    swapped_bytes: int  # copied into and out of the swap space
    swap_seconds: float  # that this took
    num_graphs: int  # shapes of steps that are captured as CUDA graphs
    mean_queue_time: float  # seconds from a request's arrival to its first step; each one's is in its metrics


class Counts:
    """What was done since the engine began."""

    def __init__(self):
        self.num_steps = self.num_prompt_tokens = self.num_cached_tokens = self.num_output_tokens = 0
        self.used_slots = self.unfilled_slots = 0  # summed over steps
        self.used_blocks = self.references = 0  # summed over steps
        self.peak_used_blocks = 0
        self.num_begun, self.queue_time = 0, 0.0
        self.swapped_bytes, self.swap_seconds = 0, 0.0

    def add_begun(self, request: Request) -> None:
        """It is in its first step."""
        self.num_begun += 1
        self.queue_time += request.metrics.queue_time
        self.num_prompt_tokens += request.num_prompt_tokens
        self.num_cached_tokens += request.num_cached_tokens

    def add_step(self, pool: BlockPool, running: list[Request], block_size: int) -> None:
        num_used = pool.num_blocks - pool.num_free_blocks
        self.num_steps += 1
        self.used_blocks += num_used
        self.references += pool.num_references
        self.used_slots += num_used * block_size
        self.unfilled_slots += num_unfilled_slots(running, block_size)
        self.peak_used_blocks = max(self.peak_used_blocks, num_used)


def num_unfilled_slots(running: list[Request], block_size: int) -> int:
    """Token slots in the used blocks that hold no token."""
    # Only at a sequence's end are slots unfilled, and those that share an end have filled it equally.
    unfilled, unfilled_of_ends = 0, {}
    for request in running:
        if request.is_single:  # as most are; it shares none but full blocks
            seq = request.active[0]
            unfilled += len(seq.block_table) * block_size - seq.num_cached_tokens
        else:
            for seq in request.active:
                end = seq.block_table[-1]
                unfilled_of_ends[end] = len(seq.block_table) * block_size - seq.num_cached_tokens
    return unfilled + sum(unfilled_of_ends.values())


def stats(engine: Engine) -> EngineStats:
    pool, scheduler, swap, counts = engine.pool, engine.scheduler, engine.swap, engine.counts
    num_used = pool.num_blocks - pool.num_free_blocks
    return EngineStats(
        num_running=sum(len(request.unfinished) for request in scheduler.running),
        num_waiting=sum(len(request.unfinished) for request in scheduler.waiting),
        max_blocks=engine.arena.max_blocks,
        num_blocks=pool.num_blocks,
        num_used_blocks=num_used,
        num_free_blocks=pool.num_free_blocks,
        num_cached_blocks=pool.num_cached_blocks,
        peak_used_blocks=counts.peak_used_blocks,
        num_slabs=engine.arena.num_slabs,
        kv_cache_bytes=engine.arena.num_bytes,
        num_unfilled_slots=num_unfilled_slots(scheduler.running, engine.config.block_size),
        mean_waste=counts.unfilled_slots / counts.used_slots if counts.used_slots else 0.0,
        num_blocks_saved=pool.num_references - num_used,
        mean_sharing=1 - counts.used_blocks / counts.references if counts.references else 0.0,
        num_steps=counts.num_steps,
        num_prompt_tokens=counts.num_prompt_tokens,
        num_cached_tokens=counts.num_cached_tokens,
        num_output_tokens=counts.num_output_tokens,
        num_copies=engine.blocks.num_copies,
        num_evictions=pool.num_evictions,
        num_preemptions=scheduler.num_preemptions,
        num_swaps=scheduler.num_swaps,
        num_tokens_lost=scheduler.num_tokens_lost,
        num_swapped_blocks=swap.pool.num_blocks - swap.pool.num_free_blocks if swap else 0,
        swap_space_bytes=engine.swap_arena.num_bytes if swap else 0,
        swapped_bytes=counts.swapped_bytes,
        swap_seconds=counts.swap_seconds,
        num_graphs=engine.runner.num_graphs if engine.runner else 0,  # none when it is closed
        mean_queue_time=counts.queue_time / counts.num_begun if counts.num_begun else 0.0,
    )
