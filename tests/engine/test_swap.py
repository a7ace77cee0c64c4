"""Preempted requests keep what they have computed in the host's memory, or compute it again: nobody can tell."""

import pytest
from fake_model import (
    BYTES_PER_TOKEN,
    audit,
    expected_outputs,
    make_engine,
    params_of,
    preempt,
    prompt_of,
    run_all,
    tokens,
)

from cupaged.config import EngineConfig
from cupaged.engine.sequence import SequenceState
from cupaged.engine.swap import Rate
from cupaged.sampling_params import RequestOutputKind

BLOCK_SIZE = 8  # of make_engine
BLOCK_BYTES = BLOCK_SIZE * BYTES_PER_TOKEN
MODES = ["recompute", "swap"]


def swapping_engine(num_blocks=64, swap_blocks=64, **config):
    return make_engine(num_blocks, preemption_mode="swap", swap_space_bytes=swap_blocks * BLOCK_BYTES, **config)


def computed_tokens(engine):
    return sum(sum(lens) for _, lens in engine.runner.decoder.batches)


# -- equality -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 7))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("swap_blocks", [5, 100])
def test_class_12_a_tiny_pool_gives_what_a_large_one_gives(n, mode, caching, swap_blocks):
    params = params_of(n, max_tokens=18)
    prompts = {str(length): prompt_of(length, salt=length) for length in (3, 12, 16, 21)}
    outputs = {}
    for num_blocks in (2 + 4 * n, 500):
        engine = make_engine(
            num_blocks,
            max_model_len=48,
            enable_prefix_caching=caching,
            preemption_mode=mode,
            swap_space_bytes=swap_blocks * BLOCK_BYTES,
        )
        for name, prompt in prompts.items():
            engine.add_request(name, prompt, params)
        outputs[num_blocks] = {name: tokens(output) for name, output in run_all(engine).items()}
        stats = engine.stats()
        assert stats.num_used_blocks == stats.num_swapped_blocks == 0
        if num_blocks == 500:
            assert stats.num_preemptions == 0
        else:
            assert stats.num_preemptions > 0
            assert (stats.num_swaps > 0) == (mode == "swap")
    assert outputs[2 + 4 * n] == outputs[500] == {name: expected_outputs(p, params) for name, p in prompts.items()}


@pytest.mark.parametrize("every", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("chunk", [6, 16])
def test_classes_13_and_14_forced_preemption_every_k_steps_repeats_and_loses_nothing(every, n, mode, caching, chunk):
    engine = make_engine(
        enable_prefix_caching=caching, max_num_batched_tokens=chunk, preemption_mode=mode, swap_space_bytes=1 << 20
    )
    params = params_of(n, output_kind=RequestOutputKind.DELTA)
    prompts = {str(length): prompt_of(length, length) for length in (5, 12, 20)}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, params)
    received = {name: [[] for _ in range(n)] for name in prompts}
    num_steps = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            for completion in output.outputs:
                received[output.request_id][completion.index] += completion.token_ids
        num_steps += 1
        if num_steps % every == 0 and len(engine.scheduler.running) > 1:
            preempt(engine, engine.scheduler.running[-1])
        audit(engine)
    stats = engine.stats()
    assert stats.num_preemptions >= 3
    assert stats.num_swaps == (stats.num_preemptions if mode == "swap" else 0)
    assert received == {name: expected_outputs(prompt, params) for name, prompt in prompts.items()}
    if mode == "swap":  # no token was computed twice
        assert computed_tokens(engine) == sum(len(prompt) + n * 19 for prompt in prompts.values())
        assert stats.num_tokens_lost == 0


def test_class_15_everybody_gets_on_and_in_order():
    """Four requests, each of which fills the cache alone in the end."""
    engine = swapping_engine(num_blocks=6)
    for i in range(4):
        engine.add_request(str(i), prompt_of(9 + i, i), params_of(max_tokens=30))
    finished = []
    while engine.has_unfinished_requests():
        oldest = [*engine.scheduler.running, *engine.scheduler.waiting][0].sequences[0]
        before = len(oldest.token_ids)
        finished += [output.request_id for output in engine.step() if output.finished]
        assert len(oldest.token_ids) == before + 1
        audit(engine)
    assert finished == ["0", "1", "2", "3"]
    assert engine.stats().num_swaps > 0


def test_a_request_of_higher_priority_takes_the_place_and_gives_it_back():
    engine = swapping_engine(num_blocks=8, scheduling_policy="priority")
    prompts = {name: prompt_of(20, salt) for salt, name in enumerate("abc")}
    for name in "ab":
        engine.add_request(name, prompts[name], params_of(), priority=1)
    for _ in range(3):
        engine.step()
    engine.add_request("c", prompts["c"], params_of(), priority=0)
    outputs = run_all(engine)
    assert {name: tokens(output) for name, output in outputs.items()} == {
        name: expected_outputs(prompt, params_of()) for name, prompt in prompts.items()
    }
    assert engine.stats().num_swaps > 0


# -- what is copied -----------------------------------------------------------------------------------------


def test_a_group_goes_out_and_comes_back_with_each_shared_block_once():
    engine = swapping_engine(enable_prefix_caching=False)
    engine.add_request("x", prompt_of(20), params_of(3))
    engine.step()  # the prompt: two full blocks and a half full one, and the fork
    preempt(engine, engine.scheduler.running[0])
    stats = engine.stats()
    assert (stats.num_used_blocks, stats.num_swapped_blocks, stats.num_running) == (0, 3, 0)
    assert stats.swapped_bytes == 3 * BLOCK_BYTES
    request = engine.scheduler.waiting[0]
    assert {seq.state for seq in request.sequences} == {SequenceState.SWAPPED}
    assert [engine.swap.pool.ref_count(b) for b in request.sequences[0].swapped_table] == [3, 3, 3]
    assert engine.swap.num_blocks_to_resume(request, limit=100) == 5  # two of the three copy the half full one
    engine.step()
    stats = engine.stats()
    assert (stats.num_used_blocks, stats.num_swapped_blocks) == (5, 0)
    assert stats.swapped_bytes == 6 * BLOCK_BYTES
    assert stats.num_copies == 2
    assert stats.swap_seconds > 0
    assert computed_tokens(engine) == 20 + 3
    assert tokens(run_all(engine)["x"]) == expected_outputs(prompt_of(20), params_of(3))


def test_a_block_that_was_to_be_copied_on_write_is_swapped_from_its_source():
    """The step that preempts "x" has given one of its outputs a copy already, which is never made."""
    engine = swapping_engine(num_blocks=6, enable_prefix_caching=False)
    engine.scheduler.watermark = 0
    engine.add_request("a", prompt_of(8), params_of(max_tokens=30))
    engine.add_request("x", prompt_of(20), params_of(3, max_tokens=4))
    engine.step()  # 1 and 3 blocks
    assert len(engine.scheduler.running) == 2
    table = engine.scheduler.running[1].sequences[0].block_table
    engine.step()  # "a" takes one, and the first output of "x" one; the second finds none
    assert engine.stats().num_swaps == 1
    assert engine.stats().num_copies == 0
    assert engine.stats().num_swapped_blocks == len(table) == 3
    audit(engine)
    outputs = run_all(engine)
    assert tokens(outputs["x"]) == expected_outputs(prompt_of(20), params_of(3, max_tokens=4))
    assert tokens(outputs["a"]) == expected_outputs(prompt_of(8), params_of(max_tokens=30))


@pytest.mark.parametrize("num_blocks", [6, 7, 9])
def test_class_20_copies_are_made_before_anybody_else_writes(num_blocks):
    """In debug mode, where blocks are filled with NaN when they are freed and when they are handed out: what a step
    takes from its victims it may hand out in the same step, for another request's blocks that come back too."""
    engine = swapping_engine(num_blocks, debug=True, scheduling_policy="priority")
    prompts = {str(i): prompt_of(7 + 4 * i, i) for i in range(5)}
    for i, (name, prompt) in enumerate(prompts.items()):
        engine.add_request(name, prompt, params_of(max_tokens=20), priority=-i)
        for _ in range(3):
            engine.step()
    outputs = run_all(engine)
    for name, output in outputs.items():
        assert tokens(output) == expected_outputs(prompts[name], params_of(max_tokens=20))
    assert engine.stats().num_swaps > 2


def test_a_full_swap_space_means_recompute():
    engine = swapping_engine(swap_blocks=2)
    engine.add_request("a", prompt_of(9), params_of())
    engine.add_request("b", prompt_of(20, 1), params_of())
    engine.step()
    preempt(engine, engine.scheduler.running[1])  # 3 blocks
    assert engine.scheduler.waiting[0].sequences[0].state is SequenceState.WAITING
    preempt(engine, engine.scheduler.running[0])  # 2 blocks
    assert engine.scheduler.waiting[0].sequences[0].state is SequenceState.SWAPPED
    stats = engine.stats()
    assert (stats.num_preemptions, stats.num_swaps, stats.num_tokens_lost) == (2, 1, 20)
    outputs = run_all(engine)
    assert tokens(outputs["a"]) == expected_outputs(prompt_of(9), params_of())
    assert tokens(outputs["b"]) == expected_outputs(prompt_of(20, 1), params_of())


def test_no_host_memory_means_recompute():
    engine = swapping_engine()
    engine.add_request("a", prompt_of(9), params_of())
    engine.step()
    engine.backend.out_of_memory = True
    preempt(engine, engine.scheduler.running[0])
    engine.backend.out_of_memory = False
    assert engine.stats().num_swaps == 0
    assert tokens(run_all(engine)["a"]) == expected_outputs(prompt_of(9), params_of())


def test_blocks_that_came_back_can_be_found_once_they_are_written():
    engine = swapping_engine()
    engine.add_request("a", prompt_of(20), params_of())
    engine.step()
    preempt(engine, engine.scheduler.running[0])
    engine.reset_prefix_cache()  # nothing that is in the cache now
    engine.step()
    engine.add_request("b", prompt_of(20), params_of(seed=4))
    assert run_all(engine)["b"].num_cached_tokens == 0  # and nothing that was computed before the reset


@pytest.mark.parametrize("in_the_same_step", [False, True])
def test_blocks_that_came_back_serve_others_from_the_next_step_on(in_the_same_step):
    engine = swapping_engine()
    engine.add_request("a", prompt_of(20), params_of())
    engine.step()
    preempt(engine, engine.scheduler.running[0])
    engine.pool.forget_all()  # as if others had needed the blocks
    if not in_the_same_step:
        engine.step()
    engine.add_request("b", prompt_of(20), params_of(seed=4))
    outputs = run_all(engine)
    assert outputs["b"].num_cached_tokens == (0 if in_the_same_step else 16)
    assert tokens(outputs["b"]) == expected_outputs(prompt_of(20), params_of(seed=4))


def test_a_group_waits_for_a_step_with_a_token_for_each_of_its_sequences():
    engine = swapping_engine(max_num_batched_tokens=4)
    engine.add_request("x", prompt_of(4), params_of(3))
    engine.step()
    engine.add_request("a", prompt_of(9, 1), params_of())
    for _ in range(2):
        engine.step()  # 3 tokens of "x" and one of "a"
    preempt(engine, engine.scheduler.running[0])
    for left in (0, 1):  # 4 and 3 tokens of "a"
        engine.step()
        assert engine.runner.decoder.batches[-1] == (0, [4 - left])
        assert engine.scheduler.waiting[0].is_swapped
    engine.step()
    assert engine.runner.decoder.batches[-1] == (4, [1] * 4)
    outputs = run_all(engine)
    assert tokens(outputs["x"]) == expected_outputs(prompt_of(4), params_of(3))
    assert tokens(outputs["a"]) == expected_outputs(prompt_of(9, 1), params_of())


# -- abort and failure --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", range(1, 6))
@pytest.mark.parametrize("index", [None, 0, 1, 2])
def test_class_18_abort_of_a_swapped_request_or_of_one_output(num_steps, index):
    """Swapped in its chunked prompt, after the fork, and later."""
    engine = swapping_engine(max_num_batched_tokens=12)
    engine.add_request("x", prompt_of(20, 1), params_of(3))
    for _ in range(num_steps):
        engine.step()
    preempt(engine, engine.scheduler.running[0])
    audit(engine)
    output = engine.abort("x", index)
    audit(engine)
    if index is None:
        assert not engine.has_unfinished_requests()
    else:
        output = run_all(engine)["x"]
    for completion, wanted in zip(output.outputs, expected_outputs(prompt_of(20, 1), params_of(3)), strict=True):
        if index is None or completion.index == index:
            assert completion.finish_reason == "abort"
            assert completion.token_ids == wanted[: len(completion.token_ids)]
        else:
            assert completion.token_ids == wanted
    assert engine.stats().num_used_blocks == engine.stats().num_swapped_blocks == 0


def test_a_swapped_request_outlives_a_failing_step():
    """It can't rely on its copies then, as the step was to make some of them, and begins anew."""
    engine = swapping_engine(num_blocks=6)
    for i in range(3):
        engine.add_request(str(i), prompt_of(9 + i, i), params_of(max_tokens=30))
    while not engine.stats().num_swaps:
        engine.step()
    received = {r.request_id: r.sequences[0].token_ids[:] for r in engine.scheduler.waiting}
    engine.runner.decoder.fail = RuntimeError("a kernel failed")
    with pytest.raises(RuntimeError, match="a kernel failed"):
        engine.step()
    audit(engine)
    assert engine.stats().num_swapped_blocks == 0
    assert received
    outputs = run_all(engine)
    assert set(received) == set(outputs)
    for name, output in outputs.items():
        assert tokens(output) == expected_outputs(prompt_of(9 + int(name), int(name)), params_of(max_tokens=30))


@pytest.mark.parametrize("method", ["swap", "launch"])
def test_a_swap_that_fails_leaks_nothing(method, monkeypatch):
    engine = swapping_engine(num_blocks=6, debug=True)
    for i in range(3):
        engine.add_request(str(i), prompt_of(9 + i, i), params_of(max_tokens=30))
    original = getattr(engine.runner, method)

    def fail(*args):
        if engine.scheduler.num_swaps:
            monkeypatch.setattr(engine.runner, method, original)
            raise RuntimeError("a copy failed")
        return original(*args)

    monkeypatch.setattr(engine.runner, method, fail)
    with pytest.raises(RuntimeError, match="a copy failed"):
        run_all(engine)
    audit(engine)
    assert engine.has_unfinished_requests()
    for name, output in run_all(engine).items():
        assert tokens(output) == expected_outputs(prompt_of(9 + int(name), int(name)), params_of(max_tokens=30))


def lose_a_reference(engine):
    engine.swap.pool._blocks[0].ref_count += 1


def lose_a_table(engine):
    engine.scheduler.waiting[0].sequences[0].swapped_table = []


def change_a_state(engine):
    engine.scheduler.waiting[0].sequences[0].state = SequenceState.WAITING


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_reference, "swap space: block 0 has 2 references, but 1 tables hold it"),
        (lose_a_table, "request 'x' sequence 0 has 20 tokens in 0 blocks of the swap space"),
        (change_a_state, "request 'x' sequence 0 waits for all to be computed, but has 20 tokens"),
    ],
)
def test_the_audit_covers_the_swap_space(damage, message):
    engine = swapping_engine()
    engine.add_request("x", prompt_of(20), params_of())
    engine.step()
    preempt(engine, engine.scheduler.running[0])
    assert engine.audit() == []
    damage(engine)
    assert message in "; ".join(engine.audit())


# -- the choice ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bytes_per_second", "tokens_per_second", "is_swapped"),
    [(1e6, 1e3, True), (1e6, 1e6, False), (1e3, 1e3, False), (38.5e3, 1e3, True), (38.3e3, 1e3, False)],
)
def test_auto_compares_copies_both_ways_with_the_tokens_to_compute_again(
    bytes_per_second, tokens_per_second, is_swapped
):
    """2 * 3 blocks of 128 bytes against 20 tokens: even at 38.4 bytes a token."""
    engine = make_engine(preemption_mode="auto", swap_space_bytes=1 << 20)
    engine.add_request("x", prompt_of(20), params_of())
    engine.step()
    engine.swap.copy_rate, engine.swap.prefill_rate = Rate(bytes_per_second), Rate(tokens_per_second)
    preempt(engine, engine.scheduler.running[0])
    assert engine.scheduler.waiting[0].is_swapped is is_swapped
    assert tokens(run_all(engine)["x"]) == expected_outputs(prompt_of(20), params_of())


def test_a_prompt_that_several_outputs_share_is_computed_once():
    engine = make_engine()
    engine.add_request("x", prompt_of(20), params_of(3))
    for _ in range(4):
        engine.step()
    request = engine.scheduler.running[0]
    assert request.num_computed_tokens == 20 + 3 * 3
    engine.scheduler.preempt(request)
    assert engine.stats().num_tokens_lost == 29


def test_rates_are_measured_and_what_is_recent_counts_most():
    rate = Rate(100.0)
    assert rate.per_second == 100
    rate.add(10, 2)
    assert rate.per_second == 5
    for _ in range(30):
        rate.add(40, 2)
    assert rate.per_second == pytest.approx(20, rel=0.01)

    engine = swapping_engine()
    guesses = engine.swap.copy_rate.per_second, engine.swap.prefill_rate.per_second
    engine.add_request("x", prompt_of(20), params_of())
    engine.step()
    preempt(engine, engine.scheduler.running[0])
    assert engine.swap.copy_rate.per_second != guesses[0]
    assert engine.swap.prefill_rate.per_second != guesses[1]


# -- options ------------------------------------------------------------------------------------------------


def test_options_are_checked():
    with pytest.raises(ValueError, match="preemption_mode must be one of auto, recompute, swap; got 'copy'"):
        EngineConfig(preemption_mode="copy")
    with pytest.raises(ValueError, match="swap_space_bytes must be an integer >= 0, or None; got -1"):
        EngineConfig(swap_space_bytes=-1)
    with pytest.raises(ValueError, match="swap_space_bytes must be more than 0 for preemption_mode 'swap'; got 0"):
        EngineConfig(preemption_mode="swap", swap_space_bytes=0)
    with pytest.raises(ValueError, match=r"swap_space_bytes: one block needs 0\.1 KiB; got 0\.1 KiB"):
        make_engine(preemption_mode="swap", swap_space_bytes=100)


@pytest.mark.parametrize(
    ("device", "config", "num_bytes"),
    [
        ("cpu", {}, 0),
        ("cpu", {"preemption_mode": "swap"}, 4 << 30),
        ("cpu", {"swap_space_bytes": 1024}, 1024),
        ("cuda", {}, 4 << 30),
        ("cuda", {"swap_space_bytes": 0}, 0),
        ("cuda", {"preemption_mode": "recompute"}, 0),
        ("cuda", {"preemption_mode": "recompute", "swap_space_bytes": 1024}, 0),
    ],
)
def test_how_large_the_swap_space_may_get(device, config, num_bytes, monkeypatch):
    monkeypatch.setattr("fake_model.FakeBackend.name", device)
    engine = make_engine(**config)
    assert (engine.swap_arena.max_blocks * BLOCK_BYTES if engine.swap else 0) == num_bytes
    assert engine.stats().swap_space_bytes == 0  # nothing is taken before it is needed


def test_closing_gives_the_swap_space_back():
    engine = swapping_engine()
    engine.add_request("x", prompt_of(20), params_of())
    engine.step()
    preempt(engine, engine.scheduler.running[0])
    assert engine.stats().swap_space_bytes > 0
    engine.close()
    assert not engine.swap_arena.slabs
