"""Sliding windows: blocks that no token attends to any more are given back, and never too early."""

import pytest
from fake_model import audit, expected_output, make_engine, model_with, preempt, prompt_of, run_all, tokens

from cupaged.engine.block_pool import NULL_BLOCK
from cupaged.sampling_params import SamplingParams

BLOCK_SIZE = 8  # of make_engine
# Multiples of the block size and numbers that share no factor with it, smaller and larger ones.
WINDOWS = [1, 2, 7, 8, 9, 15, 16, 17, 21, 64]


def greedy(max_tokens):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("chunk", [1, 3, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 100])
@pytest.mark.parametrize("caching", [False, True])
def test_classes_24_and_25_window_and_block_size_in_every_relation(window, chunk, caching):
    """run_all fills what is free with NaN after every step, and the model fails when it reads that. Hits begin at
    every block: each prompt begins with a part of the one before it."""
    engine = make_engine(
        model=model_with(sliding_window=window), max_num_batched_tokens=chunk, enable_prefix_caching=caching
    )
    for i in range(8):
        prompt = prompt_of(50)[: 50 - 6 * i]
        prompt += prompt_of(i, salt=1)
        engine.add_request("x", prompt, greedy(20))
        output = run_all(engine)["x"]
        assert tokens(output) == [expected_output(prompt, 20, ignore_eos=True, window=window)]
        assert engine.stats().num_used_blocks == 0


def test_a_long_output_holds_no_more_than_the_window():
    window = 21
    engine = make_engine(num_blocks=64, model=model_with(sliding_window=window), enable_prefix_caching=False)
    engine.add_request("x", prompt_of(5), greedy(400))
    most = 0
    while engine.has_unfinished_requests():
        engine.step()
        audit(engine)
        most = max(most, engine.stats().num_used_blocks)
        for request in engine.scheduler.running:
            [seq] = request.active
            first_attended = max(0, seq.num_cached_tokens - window + 1)
            nulls = [i for i, block_id in enumerate(seq.block_table) if block_id == NULL_BLOCK]
            assert nulls == list(range(first_attended // BLOCK_SIZE))
    assert most == 1 + -(-window // BLOCK_SIZE)


def test_what_has_left_the_window_makes_room_for_others():
    """In a cache that holds four whole sequences, twelve run at once in the end."""

    def peak_running(**fields):
        engine = make_engine(num_blocks=48, model=model_with(**fields), enable_prefix_caching=False)
        for i in range(16):
            engine.add_request(str(i), prompt_of(8, salt=i), greedy(88))
        most = 0
        while engine.has_unfinished_requests():
            engine.step()
            most = max(most, engine.stats().num_running)
            longest = max([len(r.sequences[0].token_ids) for r in engine.scheduler.running], default=0)
            if longest > 60:
                return engine.stats().num_running
        raise AssertionError

    assert peak_running(sliding_window=10) > 2 * peak_running()


@pytest.mark.parametrize("window", [1, 8, 21, 64])
@pytest.mark.parametrize("chunk", [1, BLOCK_SIZE, 13, 40])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_a_long_prompt_holds_no_more_than_the_window_and_a_chunk(window, chunk, mode):
    """When it is admitted, chunk by chunk, and when it comes back in the middle."""
    engine = make_engine(
        model=model_with(sliding_window=window),
        max_num_batched_tokens=chunk,
        enable_prefix_caching=False,
        preemption_mode=mode,
        swap_space_bytes=1 << 20,
    )
    engine.add_request("x", prompt_of(400), greedy(3))
    most = 0
    while engine.has_unfinished_requests():
        outputs = engine.step()
        audit(engine)
        most = max(most, engine.stats().peak_used_blocks)
        if engine.stats().num_preemptions == 0 and engine.scheduler.running[0].active[0].num_cached_tokens > 200:
            preempt(engine, engine.scheduler.running[0])
    assert most <= 1 + -(-(chunk + window) // BLOCK_SIZE)
    assert tokens(outputs[0]) == [expected_output(prompt_of(400), 3, ignore_eos=True, window=window)]


def test_long_prompts_run_at_once_in_a_cache_that_holds_one_of_them():
    def most_running(**fields):
        engine = make_engine(num_blocks=64, model=model_with(**fields), max_num_batched_tokens=64)
        for i in range(4):
            engine.add_request(str(i), prompt_of(450, salt=i), greedy(20))
        most, outputs = 0, {}
        while engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in engine.step()}
            audit(engine)
            most = max(most, engine.stats().num_running)
        assert engine.stats().num_preemptions == 0
        for i in range(4):
            expected = expected_output(prompt_of(450, salt=i), 20, ignore_eos=True, window=fields["sliding_window"])
            assert tokens(outputs[str(i)]) == [expected]
        return most

    assert most_running(sliding_window=None) == 1
    assert most_running(sliding_window=30) == 4


@pytest.mark.parametrize("window", [3, 8, 13, 30])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("every", [1, 3])
def test_preempted_and_forked_sequences_with_windows(window, n, mode, every):
    engine = make_engine(
        model=model_with(sliding_window=window),
        max_num_batched_tokens=11,
        preemption_mode=mode,
        swap_space_bytes=1 << 20,
    )
    params = SamplingParams(n=n, seed=3, max_tokens=25, ignore_eos=True)
    prompts = {str(length): prompt_of(length, length) for length in (5, 12, 40)}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, params)
    outputs, num_steps = {}, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs[output.request_id] = tokens(output)
        num_steps += 1
        if num_steps % every == 0 and len(engine.scheduler.running) > 1:
            preempt(engine, engine.scheduler.running[-1])
        audit(engine)
    for name, prompt in prompts.items():
        assert outputs[name] == [
            expected_output(prompt, 25, seed=3 + i, ignore_eos=True, window=window) for i in range(n)
        ]
    stats = engine.stats()
    assert stats.num_preemptions > 3
    assert (stats.num_swaps > 0) == (mode == "swap")
    assert stats.num_used_blocks == stats.num_swapped_blocks == 0


def test_a_swapped_sequence_takes_only_its_window_along():
    engine = make_engine(model=model_with(sliding_window=10), preemption_mode="swap", swap_space_bytes=1 << 20)
    engine.add_request("x", prompt_of(60), greedy(20))
    engine.step()
    preempt(engine, engine.scheduler.running[0])
    assert engine.stats().num_swapped_blocks == 2  # tokens 51 .. 60: blocks 6 and 7
    assert tokens(run_all(engine)["x"]) == [expected_output(prompt_of(60), 20, ignore_eos=True, window=10)]


def test_a_prefix_is_found_only_if_it_is_there_from_its_first_block_on():
    """Although the blocks before the window would never be read."""
    engine = make_engine(num_blocks=16, model=model_with(sliding_window=10))
    engine.add_request("x", prompt_of(60), greedy(1))
    run_all(engine)
    engine.add_request("y", prompt_of(60), greedy(1))
    engine.step()
    assert engine.stats().num_cached_tokens == 56
    engine.reset_prefix_cache()

    engine.add_request("x", prompt_of(60), greedy(20))
    engine.step()
    [seq] = engine.scheduler.running[0].active
    first = engine.pool._blocks[engine.pool.cached_blocks()[-1]]
    assert first.content.prefix == seq.prefix[0]  # of what left the window at once the head goes last
    engine.pool._forget(first)
    engine.add_request("y", prompt_of(60), greedy(1))
    assert run_all(engine)["y"].num_cached_tokens == 0


def keep_a_block(engine):
    table = engine.scheduler.running[0].sequences[0].block_table
    table[0] = engine.pool.allocate(1)[0]


def lose_a_block(engine):
    table = engine.scheduler.running[0].sequences[0].block_table
    engine.pool.free([table[-1]])
    table[-1] = NULL_BLOCK


@pytest.mark.parametrize("damage", [keep_a_block, lose_a_block])
def test_the_audit_knows_which_blocks_are_needed(damage):
    engine = make_engine(model=model_with(sliding_window=10))
    engine.add_request("x", prompt_of(60), greedy(20))
    engine.step()
    assert engine.audit() == []
    damage(engine)
    assert "request 'x' sequence 0 needs its blocks from number 6 on" in "; ".join(engine.audit())
