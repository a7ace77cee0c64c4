"""Do the engine's books agree with each other? For tests, and for every step in debug mode."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from cupaged.engine.block_pool import NULL_BLOCK, BlockPool
from cupaged.engine.prefix import PrefixBlock
from cupaged.engine.sequence import Sequence, SequenceState

if TYPE_CHECKING:
    from cupaged.engine.engine import Engine
    from cupaged.memory.arena import KVArena


def audit(engine: Engine) -> list[str]:
    """What is wrong, a line each. Costs as much as there are blocks and tokens; not to be called in mid-step."""
    scheduler = engine.scheduler
    running = [seq for request in scheduler.running for seq in request.unfinished]
    waiting = [seq for request in scheduler.waiting for seq in request.unfinished]
    held = [seq.block_table for seq in [*running, *scheduler.leaving]]
    return [
        *_audit_sequences(engine, running, waiting),
        *_audit_pool(engine.pool, engine.arena, held),
        *_audit_swap_space(engine, waiting),
        *_audit_contents(engine),
        *(problem for seq in running for problem in _audit_prefix(engine, seq)),
    ]


def _audit_sequences(engine: Engine, running: list[Sequence], waiting: list[Sequence]):
    scheduler, block_size = engine.scheduler, engine.config.block_size
    for name, requests in (("running", scheduler.running), ("waiting", scheduler.waiting)):
        ranks = [request.rank for request in requests]
        if ranks != sorted(ranks):
            yield f"the {name} requests are out of order: {ranks}"
    known = Counter(id(request) for request in engine._requests.values())
    if known != Counter(map(id, [*scheduler.running, *scheduler.waiting])):
        yield "the unfinished requests are not those that run and those that wait"
    rows = sorted([seq.row for seq in [*running, *scheduler.leaving]] + scheduler._free_rows)
    if rows != list(range(scheduler.max_num_seqs)):
        yield f"the rows of running and leaving sequences and the free rows are {rows}, not each row once"
    for seq in running:
        name, request = _name(seq), seq.request
        if seq.state is not SequenceState.RUNNING:
            yield f"{name} is {seq.state.value}, but its request runs"
        start = engine.blocks.first_needed_block(seq.num_cached_tokens)
        needed = seq.block_table[start:]
        if NULL_BLOCK in needed or set(seq.block_table[:start]) - {NULL_BLOCK}:
            yield f"{name} needs its blocks from number {start} on, but has {seq.block_table}"
        if len(set(needed)) != len(needed):
            yield f"{name} has a block twice in its table {seq.block_table}"
        if seq.num_cached_tokens > len(seq.block_table) * block_size:
            yield f"{name} has {seq.num_cached_tokens} tokens in {len(seq.block_table)} blocks"
        if seq.num_cached_tokens >= len(seq.token_ids):
            yield f"{name} has no token left to compute"
        if seq not in request.active and (seq.block_table or not request.is_forking):
            yield f"{name} doesn't take part in its request"
        if seq.swapped_table:
            yield f"{name} runs, but holds blocks {seq.swapped_table} of the swap space"
    for seq in waiting:
        name, request = _name(seq), seq.request
        if seq.block_table or seq.row != -1:
            yield f"{name} waits, but holds blocks {seq.block_table} or row {seq.row}"
        expected = SequenceState.SWAPPED if request.is_swapped else SequenceState.WAITING
        if seq.state is not expected:
            yield f"{name} is {seq.state.value}, but its request is {expected.value}"
        if seq.num_cached_tokens and not (request.is_swapped and seq in request.active):
            yield f"{name} waits for all to be computed, but has {seq.num_cached_tokens} tokens"
        if len(seq.swapped_table) != -(-seq.num_cached_tokens // block_size):
            yield f"{name} has {seq.num_cached_tokens} tokens in {len(seq.swapped_table)} blocks of the swap space"


def _audit_swap_space(engine: Engine, waiting: list[Sequence]):
    if engine.swap is None:
        return
    for problem in _audit_pool(engine.swap.pool, engine.swap_arena, [seq.swapped_table for seq in waiting]):
        yield f"swap space: {problem}"
    if engine.swap._ins:
        yield f"swap space: {engine.swap._ins} were not copied into the cache"


def _audit_pool(pool: BlockPool, arena: KVArena, tables: list[list[int]]):
    """Are the blocks of a pool held as often as it says, or in the right queue?"""
    held = Counter(block_id for table in tables for block_id in table if block_id != NULL_BLOCK)
    block_ids = pool.block_ids()
    for block_id in block_ids:
        if pool.ref_count(block_id) != held[block_id]:
            yield f"block {block_id} has {pool.ref_count(block_id)} references, but {held[block_id]} tables hold it"
    if unknown := sorted(held.keys() - block_ids):
        yield f"tables hold blocks {unknown}, which don't exist"
    if pool.num_references != held.total():
        yield f"the pool counts {pool.num_references} references, but tables hold {held.total()}"
    blocks_per_slab = arena.layout.blocks_per_slab
    slabs = [index for index, slab in enumerate(arena.slabs) if slab is not None]
    backed = [block_id for index in slabs for block_id in range(index * blocks_per_slab, (index + 1) * blocks_per_slab)]
    if block_ids != backed or pool.num_blocks != len(backed):
        yield f"the pool has {pool.num_blocks} blocks {block_ids}, but slabs {slabs} of {blocks_per_slab} have memory"
    used = Counter(block_id // blocks_per_slab for block_id in block_ids if pool.ref_count(block_id) > 0)
    for slab in pool._slabs:
        if slab.num_used != used[slab.index]:
            yield f"slab {slab.index} counts {slab.num_used} used blocks, but {used[slab.index]} have references"
    unused, cached = pool.unused_blocks(), pool.cached_blocks()
    if pool.num_free_blocks != len(unused) + len(cached) or pool.num_cached_blocks != len(cached):
        yield f"{pool.num_free_blocks} blocks should be free, but the queues hold {len(unused)} and {len(cached)}"
    free = [block_id for block_id in block_ids if pool.ref_count(block_id) == 0]
    if sorted(unused + cached) != free:
        yield f"the queues hold {sorted(unused + cached)}, but {free} have no reference"
    for block_id in unused:
        if pool.content(block_id) is not None:
            yield f"block {block_id} can be found, but is queued as unused"
    for block_id in cached:
        if pool.content(block_id) is None:
            yield f"block {block_id} can't be found, but is queued as cached"


def _audit_contents(engine: Engine):
    pool = engine.pool
    with_content = [b for b in pool.block_ids() if pool.content(b) is not None]
    if len(with_content) != len(pool._by_digest):
        yield f"{len(with_content)} blocks say what they hold, but {len(pool._by_digest)} are in the map"
    for block_id in with_content:
        content = pool.content(block_id)
        found = pool._by_digest.get(content.prefix.digest)
        if found is None or found.block_id != block_id:
            yield f"block {block_id} is not found by its own digest"
        if engine.hasher.hash_block(content.prefix.parent_digest, content.prefix.tokens) != content.prefix.digest:
            yield f"block {block_id} has a digest that is not that of its tokens"


def _audit_prefix(engine: Engine, seq: Sequence):
    """Do the findable blocks in the table hold the sequence's own tokens?"""
    if engine.hasher is None:
        return
    blocks: list[PrefixBlock] = []
    engine.hasher.extend(blocks, seq.token_ids, seq.request.prefix_key)
    num_full = seq.num_cached_tokens // engine.config.block_size
    if seq.link is not None and seq.block_table and seq.num_registered_blocks != num_full:
        yield f"{_name(seq)} has {num_full} full blocks, of which {seq.num_registered_blocks} were registered"
    for i, block_id in enumerate(seq.block_table):
        content = engine.pool.content(block_id) if block_id != NULL_BLOCK else None
        if content is not None and (i >= num_full or content.prefix != blocks[i]):
            yield f"block {block_id}, number {i} of {_name(seq)}, can be found by tokens that it does not hold"


def _name(seq: Sequence) -> str:
    return f"request {seq.request.request_id!r} sequence {seq.index}"
