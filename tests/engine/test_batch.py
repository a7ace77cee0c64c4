import time

import numpy as np
import pytest

from cupaged.engine.batch import BatchBuilder
from cupaged.engine.block_manager import BlockManager
from cupaged.engine.block_pool import BlockPool
from cupaged.engine.scheduler import Scheduler
from cupaged.engine.sequence import Request
from cupaged.sampling_params import SamplingParams

BLOCK_SIZE = 16


def make(num_seqs, prompt_len, max_num_batched_tokens=1 << 20, slab=4096):
    scheduler = Scheduler(
        BlockManager(BlockPool(lambda: slab), BLOCK_SIZE),
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    for i in range(num_seqs):
        prompt = [1000 * i + j for j in range(prompt_len + i % 3)]
        scheduler.add(Request(str(i), None, prompt, SamplingParams(), 0, 0.0))
    return scheduler, BatchBuilder(max_num_seqs=num_seqs, max_model_len=8192, block_size=BLOCK_SIZE)


def advance(scheduler, schedule):
    scheduler.complete(schedule)
    for i, seq in schedule.sampled:
        seq.token_ids.append(-i)


def expected_batch(schedule):
    """Token by token, from the sequences alone."""
    token_ids, positions, slots, ends = [], [], [], [0]
    for seq, num_tokens in zip(schedule.sequences, schedule.num_tokens, strict=True):
        for p in range(seq.num_cached_tokens, seq.num_cached_tokens + num_tokens):
            token_ids.append(seq.token_ids[p])
            positions.append(p)
            slots.append(seq.block_table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE)
        ends.append(len(token_ids))
    return token_ids, positions, slots, ends


@pytest.mark.parametrize("budget", [5, 40, 1000])
def test_batches_against_the_formula(budget):
    """Through prefill in chunks, decode over block borders, and rows that change hands."""
    scheduler, builder = make(4, 30, max_num_batched_tokens=budget)
    for step in range(60):
        if step % 20 == 19:  # the first leaves, another takes its row
            scheduler.finish(scheduler.running[0].sequences[0], "stop")
            scheduler.add(Request("new", None, [step] * 50, SamplingParams(), 0, 0.0))
        schedule = scheduler.schedule()
        batch = builder.build(schedule, [i for i, _ in schedule.sampled])
        token_ids, positions, slots, ends = expected_batch(schedule)
        assert batch.token_ids.tolist() == token_ids
        assert batch.positions.tolist() == positions
        assert batch.slot_mapping.tolist() == slots
        assert batch.query_start_loc.tolist() == ends
        assert batch.num_decodes == schedule.num_tokens.count(1)
        assert batch.max_query_len == max([n for n in schedule.num_tokens if n > 1], default=0)
        for i, seq in enumerate(schedule.sequences):
            length = seq.num_cached_tokens + schedule.num_tokens[i]
            assert batch.seq_lens[i] == length
            num_blocks = -(-length // BLOCK_SIZE)
            assert batch.block_tables[i, :num_blocks].tolist() == seq.block_table[:num_blocks]
        last = [i for i, seq in enumerate(schedule.sequences) if ends[i + 1] - ends[i] == seq.num_uncomputed_tokens]
        assert batch.logits_indices.tolist() == [ends[i + 1] - 1 for i in last]
        advance(scheduler, schedule)


def test_scheduling_and_building_a_decode_step_of_256_sequences_takes_less_than_a_millisecond():
    scheduler, builder = make(256, 1000)
    advance(scheduler, scheduler.schedule())
    times = []
    for _ in range(40):
        start = time.perf_counter()
        schedule = scheduler.schedule()
        batch = builder.build(schedule, [i for i, _ in schedule.sampled])
        times.append(time.perf_counter() - start)
        assert batch.num_decodes == 256
        advance(scheduler, schedule)
    best = min(times)
    print(f"schedule + build at 256 sequences: {best * 1e6:.0f} us best, {np.median(times) * 1e6:.0f} us median")
    assert best < 3e-3  # 0.3 ms where nothing else runs
