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
