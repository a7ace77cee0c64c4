"""Aborts from other threads, interrupts anywhere, full queues; and an audit that finds what is wrong."""

import signal
import threading
import time

import numpy as np
import pytest
from fake_model import audit, expected_output, make_engine, params_of, prompt_of, run_all

from cupaged.errors import CupagedError, QueueFullError
from cupaged.sampling_params import SamplingParams


def greedy(max_tokens=20, **fields):
    return SamplingParams(**{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **fields})


# -- threads --------------------------------------------------------------------------------------------------


def test_requests_are_added_and_aborted_by_other_threads_while_one_steps():
    engine = make_engine(num_blocks=24, max_num_seqs=6)
    last, errors = {}, []

    def submit(name):
        try:
            for i in range(25):
                request_id = f"{name} {i}"
                engine.add_request(request_id, prompt_of(5 + i), greedy(12, n=1 + i % 3))
                if i % 2:
                    time.sleep(1e-3)
                    output = engine.abort(request_id)
                    assert output is None or output.finished
                engine.stats()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=submit, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or engine.has_unfinished_requests():
        for output in engine.step():
            last[output.request_id] = output
        assert engine.audit() == []

    assert not errors
    assert engine.stats().num_used_blocks == 0
    for name in "abcd":
        for i in range(0, 25, 2):
            wanted = expected_output(prompt_of(5 + i), 12, ignore_eos=True)
            assert [c.token_ids for c in last[f"{name} {i}"].outputs] == [wanted] * (1 + i % 3)


@pytest.mark.parametrize("name", ["a", "x", "waiting"])
def test_an_abort_from_within_a_step_takes_effect_at_its_end(name):
    engine = make_engine(max_num_seqs=2)
    for salt, request_id in enumerate(["a", "x", "waiting"]):
        engine.add_request(request_id, prompt_of(9, salt), greedy())
    engine.step()
    results = []
    engine.runner.decoder.during_forward = lambda: results.append(engine.abort(name))
    outputs = engine.step()
    engine.runner.decoder.during_forward = None
    assert results == [None]
    [final] = [output for output in outputs if output.finished]
    assert (final.request_id, final.outputs[0].finish_reason) == (name, "abort")
    audit(engine)
    others = {"a", "x", "waiting"} - {name}
    assert set(run_all(engine)) == others


def test_a_step_within_a_step_is_refused():
    engine = make_engine()
    engine.add_request("a", prompt_of(9), greedy())
    engine.runner.decoder.during_forward = engine.step
    with pytest.raises(RuntimeError, match="called from within a step"):
        engine.step()
    engine.runner.decoder.during_forward = None
    engine.add_request("a", prompt_of(9), greedy())
    assert run_all(engine)["a"].finished


# -- interrupts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_class_36_an_interrupt_anywhere_leaves_the_engine_usable(async_scheduling):
    """Ctrl-C after random times, wherever the interpreter then is."""

    def interrupt(*_):
        raise KeyboardInterrupt

    engine = make_engine(num_blocks=24, max_num_batched_tokens=24, debug=True, async_scheduling=async_scheduling)
    wanted = expected_output(prompt_of(20), 6, ignore_eos=True)
    old, num_interrupts = signal.signal(signal.SIGALRM, interrupt), 0
    try:
        for i in range(400):
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-5 + (i * 37 % 400) * 2e-5)
                    for j in range(6):
                        if not engine.has_request(str(j)):
                            engine.add_request(str(j), prompt_of(9 + 5 * j, i % 3), greedy(8, n=1 + j % 3, seed=1))
                    for _ in range(8):
                        engine.step()
                        engine.abort("3")
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:  # which may come as late as in the line before
                num_interrupts += 1
            assert engine.audit() == []
            engine.abort("x")
            engine.add_request("x", prompt_of(20), greedy(6))
            if i % 20 == 0:
                assert run_all(engine)["x"].outputs[0].token_ids == wanted
    finally:
        signal.signal(signal.SIGALRM, old)
    assert num_interrupts > 100
    run_all(engine)
    assert engine.stats().num_used_blocks == 0


def test_an_exception_while_books_are_changed_ends_what_ran_and_keeps_what_waits():
    engine = make_engine(max_num_seqs=2)
    for salt, name in enumerate("abc"):
        engine.add_request(name, prompt_of(20, salt), greedy())
    engine.step()
    cached = engine.blocks.advance

    def broken(seq, num_tokens):
        cached(seq, num_tokens)
        raise KeyboardInterrupt

    engine.blocks.advance = broken
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.blocks.advance = cached
    audit(engine)
    assert [engine.has_request(name) for name in "abc"] == [False, False, True]
    engine.add_request("a", prompt_of(20), greedy())
    outputs = run_all(engine)
    assert outputs["a"].outputs[0].token_ids == expected_output(prompt_of(20), 20, ignore_eos=True)
    assert outputs["a"].num_cached_tokens == 16  # what was computed before is still there
    assert outputs["c"].outputs[0].token_ids == expected_output(prompt_of(20, 2), 20, ignore_eos=True)


# -- the queue --------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_with_an_error_of_its_own():
    engine = make_engine(max_num_seqs=1, max_queue_len=2)
    for name in "ab":
        engine.add_request(name, prompt_of(9), greedy())
    with pytest.raises(QueueFullError, match="2 requests wait already: try again later, or raise max_queue_len=2"):
        engine.add_request("c", prompt_of(9), greedy())
    assert issubclass(QueueFullError, CupagedError)
    engine.step()
    engine.add_request("c", prompt_of(9), greedy())
    assert set(run_all(engine)) == {"a", "b", "c"}


def test_queue_times_and_cached_tokens_are_counted():
    engine = make_engine(max_num_seqs=1)
    for name in "ab":
        engine.add_request(name, prompt_of(20), greedy(4))
    outputs = run_all(engine)
    times = [outputs[name].metrics.queue_time for name in "ab"]
    assert 0 <= times[0] < times[1]
    stats = engine.stats()
    assert stats.mean_queue_time == pytest.approx(sum(times) / 2)
    assert (stats.num_prompt_tokens, stats.num_cached_tokens) == (40, 16)
    assert stats.num_cached_blocks == stats.num_blocks - len(engine.pool.unused_blocks()) > 0


def test_each_request_knows_its_blocks_and_the_time_between_its_tokens(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr("cupaged.engine.engine.time.monotonic", lambda: float(next(clock)))
    engine = make_engine()
    engine.add_request("one", prompt_of(20), greedy(1))
    engine.add_request("n", prompt_of(20, salt=1), params_of(n=3, max_tokens=10))  # 2 full blocks and 3 times 2
    engine.add_request("aborted", prompt_of(9, salt=2), greedy(30))
    for _ in range(4):
        engine.step()
    aborted = engine.abort("aborted")
    assert aborted.metrics.peak_blocks == 2
    engine.scheduler.preempt(engine.scheduler.running[0])
    metrics = run_all(engine)["n"].metrics
    assert metrics.peak_blocks == 2 + 3 * 2
    assert metrics.num_output_tokens == 10
    assert metrics.inter_token_latency == (metrics.finished_time - metrics.first_token_time) / 9 > 0


# -- the audit --------------------------------------------------------------------------------------------------


def lose_a_reference(engine):
    engine.pool._blocks[0].ref_count += 1


def free_a_block_that_a_table_holds(engine):
    block_id = engine.scheduler.running[0].sequences[0].block_table[-1]
    engine.pool.free([block_id])


def hold_a_block_twice(engine):
    table = engine.scheduler.running[0].sequences[0].block_table
    table.append(table[-1])


def name_a_wrong_content(engine):
    seq = engine.scheduler.running[0].sequences[0]
    seq.token_ids[0] += 1


def change_a_digest(engine):
    block = engine.pool._blocks[engine.scheduler.running[0].sequences[0].block_table[0]]
    engine.pool._by_digest[b"other"] = engine.pool._by_digest.pop(block.content.prefix.digest)


def lose_a_free_block(engine):
    engine.pool._take_unused()


def lose_a_request(engine):
    engine.scheduler.waiting.pop()


def hold_a_row_twice(engine):
    engine.scheduler._free_rows.append(engine.scheduler.running[0].sequences[0].row)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_reference, "block 0 has 2 references, but 1 tables hold it"),
        (free_a_block_that_a_table_holds, "block 2 has 0 references, but 1 tables hold it"),
        (hold_a_block_twice, "request 'a' sequence 0 has a block twice in its table"),
        (name_a_wrong_content, "block 0, number 0 of request 'a' sequence 0, can be found by tokens"),
        (change_a_digest, "block 0 is not found by its own digest"),
        (lose_a_free_block, "blocks should be free|have no reference"),
        (lose_a_request, "the unfinished requests are not those that run and those that wait"),
        (hold_a_row_twice, "the rows of running and leaving sequences and the free rows"),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_the_audit_names_what_is_wrong(damage, message, debug):
    engine = make_engine(max_num_seqs=1, debug=debug)
    engine.add_request("a", prompt_of(20), greedy())
    engine.add_request("b", prompt_of(20, 1), greedy())
    engine.step()
    assert engine.audit() == []
    damage(engine)
    problems = "; ".join(engine.audit())
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(problems)


def test_debug_mode_stops_at_the_step_that_broke_the_books():
    engine = make_engine(debug=True)
    engine.add_request("a", prompt_of(20), greedy())
    engine.step()
    lose_a_reference(engine)
    with pytest.raises(RuntimeError, match="the engine's books are wrong: block 0 has 2 references"):
        engine.step()


def test_class_20_debug_mode_poisons_what_is_freed_and_what_is_handed_out():

    engine = make_engine(num_blocks=8, preallocate=True, debug=True, enable_prefix_caching=False)
    memory = engine.arena.slabs
    assert all(np.isnan(slab).all() for slab in memory)
    engine.add_request("a", prompt_of(20), greedy(3))
    run_all(engine)
    assert all(np.isnan(slab).all() for slab in memory)

    engine = make_engine(num_blocks=8, preallocate=True, debug=True)
    engine.add_request("a", prompt_of(60), greedy(2))
    run_all(engine)  # all blocks but one are cached
    engine.add_request("b", prompt_of(9, 1), greedy(3))
    engine.step()
    [seq] = engine.scheduler.running[0].sequences
    slab, index = divmod(seq.block_table[-1], engine.arena.layout.blocks_per_slab)
    assert np.isnan(engine.arena.slabs[slab][:, :, index, :, 1:]).all()  # one token is written there
    assert np.isfinite(engine.arena.slabs[slab][:, :, index, :, :1]).all()
