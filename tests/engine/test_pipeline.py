"""Two steps in flight: what comes out is what comes out of one step at a time. The device computes as late as it may,
and debug mode fills with NaN whatever block is free."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from fake_model import (
    EOS,
    VOCAB_SIZE,
    FakeBackend,
    FakeDecoder,
    SpreadDecoder,
    audit,
    expected_output,
    expected_outputs,
    make_engine,
    model_with,
    params_of,
    preempt,
    prompt_of,
    tokens,
)

from cupaged.config import EngineConfig
from cupaged.engine.audit import audit as audit_books
from cupaged.engine.engine import Engine
from cupaged.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

BLOCK_SIZE = 8


class PieceTokenizer:
    """Tokens are pieces of text of different lengths."""

    vocab_size = VOCAB_SIZE

    def decode(self, token_ids, skip_special_tokens=True):
        return "".join("abcdefg"[i % 7] * (i % 3) for i in token_ids)

    def decoder(self, skip_special_tokens=True):
        tokenizer = self

        class Decoder:
            def push(self, token_id):
                return tokenizer.decode([token_id])

            def flush(self):
                return "."

            def copy(self):
                return self

        return Decoder()


SETTINGS = {"async_scheduling": True, "debug": True, "idle_trim_seconds": None}


def make(decoder=None, **config):
    return make_engine(decoder=decoder, tokenizer=PieceTokenizer(), **{**SETTINGS, **config})


def run_late(engine):
    """As run_all, but nothing is waited for between the steps; in debug mode the books are audited all the same."""
    last = {}
    while engine.has_unfinished_requests():
        last |= {output.request_id: output for output in engine.step()}
    audit(engine)
    assert engine.stats().num_used_blocks == 0
    return last


def launched_ahead(engine):
    """Of each step from the second on, whether it was launched before the one before it was waited for."""
    log = engine.backend.log
    return [
        log.index(("launch", step)) < log.index(("wait", step - 1))
        for step in range(2, engine.backend.num_launched + 1)
    ]


def greedy(max_tokens=20, **fields):
    return SamplingParams(**{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **fields})


# -- what is launched when ------------------------------------------------------------------------------------


def test_the_next_step_is_launched_before_the_tokens_of_this_one_are_waited_for():
    engine = make()
    for salt in range(3):
        engine.add_request(str(salt), prompt_of(9 + salt, salt), params_of(max_tokens=6))
    run_late(engine)
    events = [("launch", 1)]
    for step in range(2, 7):
        events += [("launch", step), ("wait", step - 1)]
    assert engine.backend.log == [*events, ("wait", 6)]


def test_without_it_each_step_is_waited_for():
    engine = make_engine()
    engine.add_request("x", prompt_of(9), greedy(6))
    engine.step()
    assert engine.pipeline.in_flight is None
    assert len(engine.runner.decoder.batches) == 1


@pytest.mark.parametrize(
    ("params", "waits"),
    [
        (greedy(6), False),
        (greedy(6, n=3, logprobs=2, stop=["zz"], stop_token_ids=[3]), False),
        (params_of(6, best_of=7), False),
        (greedy(6, presence_penalty=1), True),
        (greedy(6, allowed_token_ids=[1, 2, 3]), True),
        (greedy(6, min_tokens=2, stop_token_ids=[3]), True),
        (BeamSearchParams(2, 6, ignore_eos=True), True),
    ],
)
def test_what_depends_on_tokens_waits_for_them(params, waits):
    engine = make(SpreadDecoder())
    engine.add_request("plain", prompt_of(9), greedy(4))
    engine.add_request("x", prompt_of(11, 1), params)
    run_late(engine)
    ahead = launched_ahead(engine)
    assert not any(ahead) if waits else all(ahead)


def test_it_is_for_gpus_unless_somebody_decides():
    def is_async(name, asked):
        backend = FakeBackend()
        backend.name = name
        config = EngineConfig(kv_cache_memory_bytes=1 << 14, max_model_len=32, async_scheduling=asked)
        return Engine(config, make_engine().model, FakeDecoder(), backend).pipeline.is_async

    assert [is_async("cuda", None), is_async("cpu", None)] == [True, False]
    assert [is_async(name, asked) for name in ("cuda", "cpu") for asked in (True, False)] == [True, False] * 2
    with pytest.raises(ValueError, match="async_scheduling must be True, False or None; got 1"):
        EngineConfig(async_scheduling=1)


def num_computed(engine):
    return sum(sum(lengths) for _, lengths in engine.runner.decoder.batches)


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 8, 9])
def test_who_ends_by_length_computes_nothing_more(max_tokens):
    engine = make()
    engine.add_request("x", prompt_of(7), greedy(max_tokens))
    engine.add_request("at the limit", prompt_of(20), greedy(None))
    engine.max_model_len = 24
    engine.add_request("to the limit", prompt_of(20, 1), greedy(None))
    engine.abort("at the limit")
    outputs = run_late(engine)
    assert tokens(outputs["x"]) == [expected_output(prompt_of(7), max_tokens, ignore_eos=True)]
    assert tokens(outputs["to the limit"]) == [expected_output(prompt_of(20, 1), 4, ignore_eos=True)]
    assert num_computed(engine) == (7 + max_tokens - 1) + (20 + 4 - 1)


# -- sequences that end while the next step computes for them -----------------------------------------------------


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("num_tokens", range(1, 2 * BLOCK_SIZE + 2))
def test_class_20_a_stop_at_each_place_of_a_block(num_tokens, caching):
    """Its row of the next step is wasted, its blocks are kept until then, and nobody notices."""
    prompt, other = prompt_of(5), prompt_of(6, 3)
    output = expected_output(prompt, 40, seed=9, ignore_eos=True)
    end = next(i for i in range(num_tokens - 1, 40) if output[i] not in output[:i])  # the first new token from there on
    engine = make(enable_prefix_caching=caching)
    engine.add_request(
        "x", prompt, SamplingParams(seed=9, stop_token_ids=[output[end]], max_tokens=40, ignore_eos=True)
    )
    engine.add_request("other", other, greedy(60))
    finals = {}
    while "x" not in finals:
        finals |= {o.request_id: o for o in engine.step() if o.finished}
    assert tokens(finals["x"]) == [output[: end + 1]]
    assert finals["x"].outputs[0].stop_reason == output[end]
    [leaving] = engine.scheduler.leaving
    assert len(leaving.block_table) == (5 + end) // BLOCK_SIZE + 1  # room for the stop token as well
    assert all(engine.pool.ref_count(block_id) == 1 for block_id in leaving.block_table)
    engine.step()
    assert engine.scheduler.leaving == []
    assert not leaving.block_table
    outputs = run_late(engine)
    assert tokens(outputs["other"]) == [expected_output(other, 60, ignore_eos=True)]
    assert num_computed(engine) == (5 + end + 1) + (6 + 60 - 1)  # one in vain


def test_who_waits_gets_the_blocks_and_the_row_when_the_step_has_finished():
    prompt = prompt_of(12)
    output = expected_output(prompt, 20, ignore_eos=True)
    engine = make(num_blocks=3, max_num_seqs=1, preallocate=True, enable_prefix_caching=False)
    engine.add_request("first", prompt, greedy(10, stop_token_ids=[output[4]]))
    engine.add_request("second", prompt_of(12, 1), greedy(6))
    outputs = run_late(engine)
    assert tokens(outputs["first"]) == [output[: output.index(output[4]) + 1]]
    assert tokens(outputs["second"]) == [expected_output(prompt_of(12, 1), 6, ignore_eos=True)]


def test_a_lone_request_that_stops_leaves_a_step_that_nobody_takes_in():
    prompt = prompt_of(12)
    output = expected_output(prompt, 20, ignore_eos=True)
    engine = make()
    engine.add_request("x", prompt, greedy(stop_token_ids=[output[5]]))
    while engine.has_unfinished_requests():
        engine.step()
    assert len(engine.scheduler.leaving) == 1
    engine.add_request("y", prompt, greedy(4))
    [first] = engine.step()  # which doesn't spend a step on what is left
    assert tokens(first) == [output[:1]]
    run_late(engine)
    assert engine.trim() == engine.stats().num_slabs + engine.arena.layout.bytes_per_slab  # all of it


def test_abort_at_every_step_of_all_or_of_one_output():
    prompt, params = prompt_of(20), params_of(3, max_tokens=8)
    for num_steps in range(10):
        for index in (None, 0, 1, 2):
            engine = make(max_num_batched_tokens=9)
            engine.add_request("other", prompt_of(13, 1), greedy(15))
            engine.add_request("x", prompt, params)
            for _ in range(num_steps):
                engine.step()
            aborted = engine.abort("x", index)
            assert audit_books(engine) == []
            outputs = run_late(engine)
            assert tokens(outputs["other"]) == [expected_output(prompt_of(13, 1), 15, ignore_eos=True)]
            expected = expected_outputs(prompt, params)
            got = tokens(aborted)
            assert all(got[i] == expected[i][: len(got[i])] for i in range(3))
            if index is None:
                assert aborted.finished
                continue
            for i, completion in enumerate(outputs["x"].outputs):
                assert completion.token_ids == (got[i] if i == index else expected[i])
                assert completion.finish_reason == ("abort" if i == index else "length")


def test_an_abort_from_within_a_step():
    engine = make()
    engine.add_request("x", prompt_of(12), greedy())
    engine.add_request("other", prompt_of(12, 1), greedy())
    engine.step()
    engine.runner.decoder.during_forward = lambda: engine.abort("x")
    [final] = [output for output in engine.step() if output.finished]
    engine.runner.decoder.during_forward = None
    assert (final.request_id, final.outputs[0].finish_reason) == ("x", "abort")
    assert tokens(run_late(engine)["other"]) == [expected_output(prompt_of(12, 1), 20, ignore_eos=True)]


# -- the same outputs ------------------------------------------------------------------------------------------


def mixed_requests():
    """(id, prompt, params, options), to be added as steps go by."""
    yield "greedy", prompt_of(9), greedy(25), {}
    yield "eos", prompt_of(5, 2), SamplingParams(seed=4, max_tokens=40), {"priority": 1}
    yield "one", prompt_of(17, 1), greedy(1), {}
    yield "group", prompt_of(13, 3), params_of(4, max_tokens=18, logprobs=2), {}
    yield "best", prompt_of(10, 4), params_of(2, best_of=4, max_tokens=9), {"priority": -1}
    yield "long", prompt_of(70, 5), params_of(max_tokens=12, logprobs=0), {}
    yield "again", prompt_of(70, 5), params_of(2, max_tokens=3), {"cache_salt": "s"}
    yield "hit", prompt_of(75, 5), greedy(10, stop=["cc", "a"]), {}
    yield "stop id", prompt_of(6, 7), SamplingParams(seed=1, stop_token_ids=list(range(0, 50, 5)), max_tokens=40), {}
    yield "stop", prompt_of(8, 6), SamplingParams(seed=8, stop=["bb", "fe", "d."], max_tokens=40, ignore_eos=True), {}
    yield "penalty", prompt_of(9, 8), greedy(8, repetition_penalty=3.0, logprobs=3), {"priority": 2}
    yield "few", prompt_of(9, 9), params_of(2, max_tokens=5, allowed_token_ids=[3, 4, 5, EOS], ignore_eos=False), {}
    yield "beams", prompt_of(11, 9), BeamSearchParams(3, 7, ignore_eos=True), {}
    yield "late", prompt_of(30, 6), greedy(30, n=2), {"priority": -1}


def collect(engine, every=2):
    """What each request got, put together; a new request every so many steps. The order in which its pieces came."""
    pending, results, num_steps = list(mixed_requests()), {}, 0
    while pending or engine.has_unfinished_requests():
        while pending and num_steps >= every * (14 - len(pending)):
            name, prompt, params, options = pending.pop(0)
            engine.add_request(name, prompt, replace(params, output_kind=RequestOutputKind.DELTA), **options)
        for output in engine.step():
            for completion in output.outputs:
                result = results.setdefault((output.request_id, completion.index), [[], "", [], [], None])
                result[0] += completion.token_ids
                result[1] += completion.text
                result[2] += completion.logprobs or []
                if completion.token_ids and "beams" not in output.request_id:
                    result[3].append(len(completion.token_ids))
                assert result[4] is None  # nothing comes after the end
                if completion.finish_reason is not None:
                    result[4] = (completion.finish_reason, completion.stop_reason, completion.cumulative_logprob)
        num_steps += 1
    audit(engine)
    assert engine.stats().num_used_blocks == 0
    return results


@pytest.mark.parametrize("scheduling_policy", ["fcfs", "priority"])
@pytest.mark.parametrize("preemption_mode", ["recompute", "swap"])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(("num_blocks", "budget"), [(500, 1000), (500, 11), (24, 100), (16, 20)])
def test_class_20_mixed_requests_get_what_they_get_without(
    num_blocks, budget, caching, preemption_mode, scheduling_policy
):
    config = {
        "max_model_len": 120,
        "max_num_batched_tokens": budget,
        "enable_prefix_caching": caching,
        "preemption_mode": preemption_mode,
        "scheduling_policy": scheduling_policy,
        "swap_space_bytes": 1 << 20,
    }
    expected = collect(make(SpreadDecoder(), num_blocks=num_blocks, async_scheduling=False, **config))
    engine = make(SpreadDecoder(), num_blocks=num_blocks, **config)
    assert collect(engine) == expected
    assert {reason for *_, (reason, _, _) in expected.values()} == {"stop", "length"}
    if num_blocks < 50:
        stats = engine.stats()
        assert stats.num_preemptions > 0
        assert (stats.num_swaps > 0) == (preemption_mode == "swap")
    assert sum(launched_ahead(engine)) >= 10


@pytest.mark.parametrize("num_blocks", [12, 200])
@pytest.mark.parametrize("window", [1, 5, 8, 19])
def test_windows(window, num_blocks):
    """What a window has left is handed out anew, when nobody writes there any more."""
    model = model_with(sliding_window=window)
    engine = make(
        FakeDecoder(window), model=model, num_blocks=num_blocks, preallocate=True, max_num_batched_tokens=12,
        max_model_len=72,
    )  # fmt: skip
    wanted = {}
    for length, n in [(5, 1), (12, 2), (40, 1)]:
        params = params_of(n, max_tokens=30)
        engine.add_request(str(length), prompt_of(length), params)
        outputs = [expected_output(prompt_of(length), 30, seed=3 + i, ignore_eos=True, window=window) for i in range(n)]
        wanted[str(length)] = outputs
    assert {name: tokens(output) for name, output in run_late(engine).items()} == wanted


@pytest.mark.parametrize(
    ("window", "budget", "sizes"),
    [
        (5, 20, [(7, 2, 6), (3, 1, 12)]),
        (8, 12, [(22, 1, 12), (21, 2, 10), (5, 1, 22)]),
    ],
)
def test_blocks_that_leave_a_window_are_kept_until_the_step_has_finished(window, budget, sizes):
    """The next step could do with the very blocks that this one reads. sizes: prompt, outputs and their length."""
    engine = make(
        FakeDecoder(window), model=model_with(sliding_window=window), num_blocks=6, max_model_len=48, preallocate=True,
        max_num_batched_tokens=budget, enable_prefix_caching=False,
    )  # fmt: skip
    wanted = {}
    for i, (length, n, max_tokens) in enumerate(sizes):
        prompt = prompt_of(length, i)
        engine.add_request(str(i), prompt, params_of(n, max_tokens=max_tokens))
        outputs = [expected_output(prompt, max_tokens, seed=3 + k, ignore_eos=True, window=window) for k in range(n)]
        wanted[str(i)] = outputs
    assert {name: tokens(output) for name, output in run_late(engine).items()} == wanted


@pytest.mark.parametrize("every", [1, 2, 3])
def test_preemption_at_any_time(every):
    """What was in flight is computed again."""
    engine = make(max_num_batched_tokens=16)
    for length in (5, 12, 20):
        engine.add_request(str(length), prompt_of(length), params_of(3))
    outputs, num_steps = {}, 0
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
        num_steps += 1
        if num_steps % every == 0 and len(engine.scheduler.running) > 1:
            preempt(engine, engine.scheduler.running[-1])
    assert engine.stats().num_preemptions > 2
    for name, output in outputs.items():
        assert tokens(output) == expected_outputs(prompt_of(int(name)), params_of(3))


def record_schedules(engine):
    """What schedule_ahead gives, from now on."""
    schedules, original = [], engine.scheduler.schedule_ahead

    def schedule_ahead():
        schedules.append(original())
        return schedules[-1]

    engine.scheduler.schedule_ahead = schedule_ahead
    return schedules


def test_copies_of_a_step_that_comes_to_nothing_are_made():
    """Some that share a block have been given copies when there is none left for others, so the step waits for tokens.
    By then who holds the block may have ended."""
    num_such = 0
    for num_blocks in range(14, 26):
        engine = make(num_blocks=num_blocks, max_model_len=80, max_num_batched_tokens=6, preallocate=True)
        schedules, wanted = record_schedules(engine), {}
        for salt, (length, n, max_tokens) in enumerate([(3, 1, 45), (5, 1, 40), (60, 3, 9)]):
            params = params_of(n, max_tokens=max_tokens, ignore_eos=False)
            engine.add_request(str(salt), prompt_of(length, salt), params)
            wanted[str(salt)] = expected_outputs(prompt_of(length, salt), params)
        assert {name: tokens(output) for name, output in run_late(engine).items()} == wanted
        num_such += any(schedule.copies and not schedule.sequences for schedule in schedules)
    assert num_such > 0


# -- when something breaks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_a_step_that_fails_ends_what_ran_and_leaves_nothing_to_be_found(num_steps, late):
    engine = make(max_num_seqs=2)
    for salt, name in enumerate("abc"):
        engine.add_request(name, prompt_of(20, salt), greedy(15))
    for _ in range(num_steps):
        engine.step()
    setattr(engine.runner.decoder, "fail_late" if late else "fail", RuntimeError("a kernel failed"))
    with pytest.raises(RuntimeError, match="a kernel failed"):
        engine.step()
    assert audit_books(engine) == []
    assert [engine.has_request(name) for name in "abc"] == [False, False, True]
    for salt, name in enumerate("ab"):
        engine.add_request(name, prompt_of(20, salt), greedy(15))
    for name, output in run_late(engine).items():
        assert tokens(output) == [expected_output(prompt_of(20, "abc".index(name)), 15, ignore_eos=True)]


@pytest.mark.parametrize("temperature", [0, 1])
def test_sampling_parameters_that_a_failed_step_was_to_copy_are_copied_again(temperature):
    engine = make(max_num_seqs=1)
    for name, other in (("before", 1 - temperature), ("fails", temperature), ("after", temperature)):
        engine.add_request(name, prompt_of(12), greedy(8, temperature=other, seed=0))
        if name == "fails":
            engine.runner.decoder.fail_late = RuntimeError("a kernel failed")
            with pytest.raises(RuntimeError, match="a kernel failed"):
                engine.step()
        else:
            seed = 0 if other else None
            expected = expected_output(prompt_of(12), 8, seed=seed, ignore_eos=True)
            assert tokens(run_late(engine)[name]) == [expected]


def test_no_finite_logit_ends_a_sequence_whose_next_step_is_launched():
    prompt = prompt_of(12)
    output = expected_output(prompt, 20, ignore_eos=True)
    decoder = FakeDecoder()
    decoder.nan_after = output[4]
    engine = make(decoder)
    engine.add_request("x", prompt, greedy())
    [completion] = run_late(engine)["x"].outputs
    assert (completion.finish_reason, completion.token_ids) == ("error", output[: output.index(output[4]) + 1])


def test_the_cache_can_be_reset_and_memory_given_back_with_a_step_in_flight():
    engine = make(num_blocks=64)
    for salt in range(3):
        engine.add_request(str(salt), prompt_of(30, salt), greedy(30))
    outputs = {}
    for i in range(40):
        outputs |= {output.request_id: output for output in engine.step()}
        engine.reset_prefix_cache()
        assert engine.stats().num_cached_blocks == 0
        if i % 3 == 0:
            engine.trim()
        assert audit_books(engine) == []
    for name, output in outputs.items():
        assert tokens(output) == [expected_output(prompt_of(30, int(name)), 30, ignore_eos=True)]


def test_close_with_a_step_in_flight():
    engine = make()
    engine.add_request("x", prompt_of(12), greedy())
    engine.step()
    engine.close()
    assert engine.backend.closed
    assert engine.pipeline.in_flight is None
    assert engine.pool.num_free_blocks == engine.pool.num_blocks


def test_requests_of_other_threads():
    engine = make(num_blocks=24, max_num_seqs=6)
    last = {}

    def submit(name):
        for i in range(12):
            engine.add_request(f"{name} {i}", prompt_of(5 + i), greedy(12, n=1 + i % 3))
            if i % 2:
                engine.abort(f"{name} {i}")
            engine.stats()

    threads = [threading.Thread(target=submit, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or engine.has_unfinished_requests():
        last |= {output.request_id: output for output in engine.step()}
    assert engine.stats().num_used_blocks == 0
    for name in "ab":
        for i in range(0, 12, 2):
            assert tokens(last[f"{name} {i}"]) == [expected_output(prompt_of(5 + i), 12, ignore_eos=True)] * (1 + i % 3)


def test_the_tokens_that_stand_for_unknown_ones_are_gone_between_steps():
    engine = make()
    engine.add_request("x", prompt_of(12), greedy())
    while engine.has_unfinished_requests():
        engine.step()
        for request in engine.scheduler.running:
            assert min(request.active[0].token_ids) >= 0
            assert np.shape(request.active[0].token_ids)[0] == 12 + request.active[0].num_output_tokens
