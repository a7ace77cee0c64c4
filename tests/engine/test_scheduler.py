"""The policy, seen from outside: what runs in which step."""

import pytest

from cupaged.engine.block_manager import BlockManager
from cupaged.engine.block_pool import BlockPool
from cupaged.engine.scheduler import Scheduler
from cupaged.engine.sequence import Request, SequenceState
from cupaged.sampling_params import SamplingParams

BLOCK_SIZE = 4


def make_scheduler(num_blocks=100, max_num_seqs=8, max_num_batched_tokens=32, watermark=0, **options):
    slabs = [num_blocks]
    pool = BlockPool(lambda: slabs.pop() if slabs else 0)
    return Scheduler(
        BlockManager(pool, BLOCK_SIZE),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        watermark=watermark,
        **options,
    )


def add(scheduler, name, prompt_len):
    request = Request(name, None, [7] * prompt_len, SamplingParams(), seed=0, arrival_time=0.0)
    scheduler.add(request)
    return request.sequences[0]


def step(scheduler):
    """Schedule and 'compute'; [(name, tokens)] in batch order."""
    schedule = scheduler.schedule()
    scheduler.complete(schedule)
    for _, seq in schedule.sampled:
        seq.token_ids.append(7)
    assert all(n == 1 for n in schedule.num_tokens[: schedule.num_decodes])
    assert all(n > 1 for n in schedule.num_tokens[schedule.num_decodes :])
    names = [seq.request.request_id for seq in schedule.sequences]
    return list(zip(names, schedule.num_tokens, strict=True))


def test_prompts_share_a_step_and_decodes_stand_first():
    s = make_scheduler()
    add(s, "a", 5)
    assert step(s) == [("a", 5)]
    add(s, "b", 6)
    add(s, "c", 1)
    assert step(s) == [("a", 1), ("c", 1), ("b", 6)]
    assert step(s) == [("a", 1), ("b", 1), ("c", 1)]


def test_a_long_prompt_goes_in_chunks_beside_the_decodes():
    s = make_scheduler(max_num_batched_tokens=10)
    add(s, "a", 3)
    step(s)
    add(s, "b", 21)
    add(s, "c", 2)
    assert step(s) == [("a", 1), ("b", 9)]
    assert step(s) == [("a", 1), ("b", 9)]
    assert step(s) == [("a", 1), ("b", 3), ("c", 2)]
    assert step(s) == [("a", 1), ("b", 1), ("c", 1)]


def test_a_prompt_takes_max_chunk_tokens_of_a_step_beside_a_decode_and_all_without():
    s = make_scheduler(max_num_batched_tokens=20, max_chunk=3)
    a = add(s, "a", 25)
    assert step(s) == [("a", 20)]
    assert step(s) == [("a", 5)]
    add(s, "b", 8)
    add(s, "c", 7)
    add(s, "d", 2)
    assert step(s) == [("a", 1), ("b", 3), ("c", 3), ("d", 2)]
    assert step(s) == [("a", 1), ("d", 1), ("b", 3), ("c", 3)]
    s.finish(a, "stop")
    add(s, "e", 19)
    assert step(s) == [("c", 1), ("d", 1), ("b", 2), ("e", 3)]
    assert step(s) == [("b", 1), ("c", 1), ("d", 1), ("e", 3)]


def test_max_chunk_counts_prompts_that_are_computed_again():
    s = make_scheduler(max_num_batched_tokens=20, max_chunk=3)
    add(s, "a", 4)
    add(s, "b", 9)
    step(s)
    s.preempt(s.running[-1])
    assert step(s) == [("a", 1), ("b", 3)]


def test_no_more_than_max_num_seqs_run():
    s = make_scheduler(max_num_seqs=2)
    a, *_ = [add(s, name, 2) for name in "abc"]
    assert step(s) == [("a", 2), ("b", 2)]
    assert step(s) == [("a", 1), ("b", 1)]
    s.finish(a, "stop")
    assert step(s) == [("b", 1), ("c", 2)]


def test_the_token_budget_bounds_how_many_run():
    s = make_scheduler(max_num_seqs=8, max_num_batched_tokens=3)
    for name in "abcde":
        add(s, name, 1)
    assert step(s) == [("a", 1), ("b", 1), ("c", 1)]
    assert step(s) == [("a", 1), ("b", 1), ("c", 1)]


def test_a_prompt_waits_until_its_blocks_are_free_and_nobody_overtakes_it():
    s = make_scheduler(num_blocks=4)
    a = add(s, "a", 9)  # 3 blocks
    add(s, "b", 5)  # 2 blocks
    add(s, "c", 1)  # would fit
    assert step(s) == [("a", 9)]
    assert step(s) == [("a", 1)]
    s.finish(a, "stop")
    assert step(s) == [("c", 1), ("b", 5)]


def test_the_newest_is_preempted_loses_its_blocks_and_comes_back_first():
    s = make_scheduler(num_blocks=4)
    a, b = add(s, "a", 8), add(s, "b", 7)
    step(s)
    assert s.blocks.pool.num_free_blocks == 0
    assert step(s) == [("a", 1)]  # needs a third block; b gives both of its own
    assert b.state is SequenceState.WAITING
    assert (b.block_table, b.num_cached_tokens, b.row) == ([], 0, -1)
    assert len(b.token_ids) == 8  # what it has generated it keeps
    assert s.num_preemptions == 1
    add(s, "c", 1)
    assert step(s) == [("a", 1)]  # c could run, but b was first
    s.finish(a, "stop")
    assert step(s) == [("c", 1), ("b", 8)]


def test_a_sequence_that_is_itself_the_newest_steps_back():
    s = make_scheduler(num_blocks=4)
    a, b = add(s, "a", 5), add(s, "b", 7)
    step(s)
    assert step(s) == [("a", 1), ("b", 1)]
    assert step(s) == [("a", 1)]
    assert [request.request_id for request in s.waiting] == ["b"]
    assert a.state is SequenceState.RUNNING
    assert b.state is SequenceState.WAITING


def test_preempted_sequences_keep_their_order():
    s = make_scheduler(num_blocks=6, max_num_batched_tokens=64)
    a = add(s, "a", 8)
    for name in "bc":
        add(s, name, 7)
    step(s)
    for _ in range(8):
        step(s)
        assert [request.request_id for request in [*s.running, *s.waiting]] == ["a", "b", "c"]
    assert a.state is SequenceState.RUNNING
    assert s.num_preemptions >= 2


def test_a_sequence_that_has_all_memory_and_needs_more_fails_alone():
    """Only when the device has less memory than the cache's limit: a limit is checked at the door."""
    s = make_scheduler(num_blocks=2)
    a = add(s, "a", 8)
    b = add(s, "b", 8)
    assert step(s) == [("a", 8)]
    schedule = s.schedule()
    assert schedule.failed == [a.request]
    assert (a.state, a.finish_reason) == (SequenceState.FINISHED, "error")
    assert "2 KV cache blocks" in a.error
    assert schedule.sequences == [b]


def test_a_prompt_that_has_all_memory_and_needs_more_fails_alone():
    s = make_scheduler(num_blocks=2)
    a, b = add(s, "a", 9), add(s, "b", 8)
    schedule = s.schedule()
    assert schedule.failed == [a.request]
    assert schedule.sequences == [b]


@pytest.mark.parametrize("num_steps", range(6))
def test_finishing_in_any_state_gives_all_blocks_back(num_steps):
    s = make_scheduler(num_blocks=4, max_num_batched_tokens=4)
    sequences = [add(s, name, n) for name, n in zip("abc", (7, 6, 3), strict=True)]
    for _ in range(num_steps):
        step(s)
    for seq in sequences:
        s.finish(seq, "abort")
    assert s.blocks.pool.num_free_blocks == s.blocks.pool.num_blocks
    assert not s.running
    assert not s.waiting
    assert sorted(s._free_rows) == list(range(s.max_num_seqs))


# -- the watermark, priorities, fairness ------------------------------------------------------------------------------


def test_an_admission_leaves_a_block_for_each_sequence_that_runs():
    s = make_scheduler(num_blocks=4, watermark=1)
    a = add(s, "a", 8)
    add(s, "b", 7)
    assert step(s) == [("a", 8)]  # b's two blocks would leave none for a's next
    assert step(s) == [("a", 1)]
    s.finish(a, "stop")
    assert step(s) == [("b", 7)]  # nobody else runs, so nothing is left for others


@pytest.mark.parametrize("watermark", [0, 1])
def test_a_watermark_keeps_requests_from_thrashing(watermark):
    """Many requests in a cache that holds a few: preemptions with and without."""
    s = make_scheduler(num_blocks=12, max_num_seqs=6, max_num_batched_tokens=64, watermark=watermark)
    waiting = [add(s, str(i), 6) for i in range(30)]
    for _ in range(2000):
        step(s)
        for seq in waiting:
            if seq.num_output_tokens == 14 and seq.finish_reason is None:
                s.finish(seq, "length")
        if not s.running and not s.waiting:
            break
    assert not s.waiting
    assert s.num_preemptions > 20 if watermark == 0 else s.num_preemptions < 20


def add_with_priority(scheduler, name, prompt_len, priority):
    request = Request(name, None, [7] * prompt_len, SamplingParams(), seed=0, arrival_time=0.0, priority=priority)
    scheduler.add(request)
    return request.sequences[0]


def test_lower_values_are_served_first_and_equals_in_the_order_of_arrival():
    s = make_scheduler(by_priority=True, max_num_batched_tokens=4)
    for name, priority in (("a", 2), ("b", 0), ("c", 1), ("d", 0)):
        add_with_priority(s, name, 3, priority)
    assert step(s) == [("d", 1), ("b", 3)]
    assert [request.request_id for request in [*s.running, *s.waiting]] == ["b", "d", "c", "a"]


def test_fcfs_takes_no_note_of_priorities():
    s = make_scheduler()
    for name, priority in (("a", 2), ("b", 0)):
        add_with_priority(s, name, 3, priority)
    assert step(s) == [("a", 3), ("b", 3)]


def test_class_16_a_request_of_higher_priority_takes_blocks_and_rows_of_lower_ones():
    s = make_scheduler(num_blocks=6, max_num_seqs=2, by_priority=True)
    low = add_with_priority(s, "low", 8, 5)
    step(s)
    add_with_priority(s, "mid", 8, 3)
    assert step(s) == [("low", 1), ("mid", 8)]
    add_with_priority(s, "high", 10, 1)
    assert step(s) == [("mid", 1), ("high", 10)]
    assert low.state is SequenceState.WAITING
    assert not low.block_table
    add_with_priority(s, "mid 2", 8, 3)
    for _ in range(2):
        assert [name for name, _ in step(s)] == ["high", "mid"]  # an equal one waits
    assert s.num_preemptions == 1


def test_a_long_prompt_of_low_priority_makes_room_in_the_budget():
    s = make_scheduler(num_blocks=100, max_num_batched_tokens=10, by_priority=True)
    add_with_priority(s, "long", 60, 5)
    assert step(s) == [("long", 10)]
    add_with_priority(s, "short", 5, 1)
    assert step(s) == [("long", 1), ("short", 5)]
    assert step(s) == [("short", 1), ("long", 9)]


def test_class_15_everybody_is_served_in_the_order_of_arrival():
    s = make_scheduler(num_blocks=8, max_num_seqs=3, max_num_batched_tokens=12)
    finished, num_added = [], 0
    for i in range(3000):
        if i < 200:
            add(s, str(num_added), 1 + i * 7 % 20)
            num_added += 1
        before = {request: request.sequences[0].num_cached_tokens for request in s.running[:1]}
        step(s)
        for request, cached in before.items():
            assert request.sequences[0].num_cached_tokens > cached  # the first in service gets on in every step
        for request in list(s.running):
            if request.sequences[0].num_output_tokens == 4:
                finished.append(int(request.request_id))
                s.finish(request.sequences[0], "length")
        if not s.running and not s.waiting:
            break
    assert sorted(finished) == list(range(200))
    assert all(abs(place - number) <= 2 for place, number in enumerate(finished))


def test_a_copy_whose_sequence_is_preempted_in_the_same_step_is_not_made():
    s = make_scheduler(num_blocks=4)
    add(s, "a", 5)
    s.add(Request("group", None, [7] * 3, SamplingParams(n=3), seed=0, arrival_time=0.0))
    assert step(s) == [("a", 5), ("group", 3)]
    assert s.blocks.pool.num_free_blocks == 1
    s.watermark = 1  # or the group would come back at once
    schedule = s.schedule()  # one copy finds a block, the second does not
    assert [seq.request.request_id for seq in schedule.sequences] == ["a"]
    assert schedule.copies == []
    assert s.blocks.num_copies == 0
    assert s.num_preemptions == 1
    assert s.blocks.pool.num_free_blocks == 2


def test_a_preempted_group_comes_back_when_its_outputs_have_room_as_well():
    s = make_scheduler(num_blocks=8)
    first = add(s, "first", 4)
    group = Request("group", None, [7] * 4, SamplingParams(n=3), seed=0, arrival_time=0.0)
    s.add(group)
    while s.num_preemptions == 0:  # 8 blocks: after some tokens, 4 sequences with outputs of their own lack one
        step(s)
    assert [request.request_id for request in s.waiting] == ["group"]
    assert s.blocks.pool.num_free_blocks > 1  # the prompt alone would fit at once
    outputs = sum(-(-len(seq.token_ids) // BLOCK_SIZE) - 1 for seq in group.sequences)
    for _ in range(2):
        step(s)
        assert s.waiting or s.blocks.pool.num_free_blocks >= outputs
    s.finish(first, "stop")
    step(s)
    assert not s.waiting
    assert s.num_preemptions == 1
