"""The trace of a run, and LLM's on_step: what it is told, and what it may break."""

import io
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

from cupaged import LLM, SamplingParams
from cupaged.trace import Trace

MODEL = Path(__file__).parent / "model" / "golden" / "llama"
PROMPTS = [[5, 6, 7], list(range(20, 60)), [9] * 12]
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


def open_llm(on_step=None, **options):
    return LLM(MODEL, device="cpu", load_format="dummy", block_size=8, max_model_len=64, on_step=on_step, **options)


def written(trace):
    file = io.StringIO()
    trace.write(file)
    return json.loads(file.getvalue())


def check_shape(trace):
    """What the format asks: the fields of each kind of event, and spans that are nested."""
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    open_spans = {}
    last = -math.inf
    for event in trace["traceEvents"]:
        assert {"name", "ph", "pid", "tid"} <= set(event)
        assert isinstance(event["name"], str)
        if event["ph"] == "M":
            assert event["args"]["name"]
            continue
        assert event["ts"] >= last  # also where times are equal the order of the file is that of the nesting
        last = event["ts"]
        if event["ph"] == "X":
            assert event["dur"] >= 0
        elif event["ph"] == "C":
            assert event["args"]
            assert all(isinstance(value, int) for value in event["args"].values())
        else:
            stack = open_spans.setdefault((event["cat"], event["id"]), [])
            if event["ph"] == "b":
                stack.append(event["name"])
            else:
                assert event["ph"] == "e"
                assert stack.pop() == event["name"]
    assert open_spans
    assert not any(open_spans.values())


def spans(trace, request_id):
    """name -> (start, end), the last of a name."""
    found = {}
    for event in trace["traceEvents"]:
        if event["ph"] in "be" and event["id"] == request_id:
            found.setdefault(event["name"], [0, 0])["be".index(event["ph"])] = event["ts"]
    return found


def of_kind(trace, kind, name=None):
    return [e for e in trace["traceEvents"] if e["ph"] == kind and name in (None, e["name"])]


def test_steps_requests_and_counters():
    trace = Trace()
    with open_llm(trace.record, max_num_batched_tokens=16) as llm:
        results = llm.generate(PROMPTS, GREEDY)
        stats = llm.engine.stats()
    data = written(trace)
    check_shape(data)

    steps = of_kind(data, "X")
    assert len(steps) == stats.num_steps
    num_computed = sum(len(prompt) for prompt in PROMPTS) + len(PROMPTS) * (GREEDY.max_tokens - 1)
    assert sum(step["args"]["tokens"] for step in steps) == num_computed
    assert max(step["args"]["tokens"] for step in steps) == 16
    assert {step["name"] for step in steps} == {"prefill", "decode", "prefill + decode"}
    assert all(one["ts"] + one["dur"] <= other["ts"] for one, other in pairwise(steps))

    blocks = of_kind(data, "C", "KV blocks")
    assert [event["ts"] for event in blocks] == [step["ts"] for step in steps]
    assert {sum(event["args"].values()) for event in blocks} == {stats.num_blocks}
    assert max(event["args"]["used"] for event in blocks) > 0
    assert blocks[-1]["args"]["used"] == 0 < blocks[-1]["args"]["cached"]
    assert of_kind(data, "C", "sequences")[-1]["args"] == {"running": 0, "waiting": 0}

    for result, prompt in zip(results, PROMPTS, strict=True):
        found, metrics = spans(data, result.request_id), result.metrics
        whole = found[f"request {result.request_id}"]
        queue, prefill, decode = found["queue"], found["prefill"], found["decode"]
        assert whole == [queue[0], decode[1]]
        assert (queue[1], prefill[1]) == (prefill[0], decode[0])
        assert queue[1] - queue[0] == pytest.approx(metrics.queue_time * 1e6, abs=0.01)
        assert whole[1] - whole[0] == pytest.approx((metrics.finished_time - metrics.arrival_time) * 1e6, abs=0.01)
        (begin,) = of_kind(data, "b", f"request {result.request_id}")
        assert begin["args"]["prompt_tokens"] == len(prompt)
        assert begin["args"]["output_tokens"] == GREEDY.max_tokens
        assert begin["args"]["finish_reasons"] == ["length"]


def test_preempted_requests_show_when_they_were_out():
    trace = Trace()
    with open_llm(preemption_mode="recompute") as llm:
        bytes_per_block = llm.engine.arena.layout.bytes_per_block
    with open_llm(trace.record, kv_cache_memory_bytes=bytes_per_block * 8, preemption_mode="recompute") as llm:
        llm.generate([[3] * 15, [4] * 15, [5] * 15], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
        stats = llm.engine.stats()
    data = written(trace)
    check_shape(data)
    assert 0 < len(of_kind(data, "b", "preempted")) <= stats.num_preemptions
    for event in of_kind(data, "b", "preempted"):
        found = spans(data, event["id"])
        assert found["decode"][0] <= found["preempted"][0] < found["preempted"][1] < found["decode"][1]


def test_a_stream_that_is_broken_off_is_in_the_trace():
    trace = Trace()
    with open_llm(trace.record) as llm:
        stream = llm.stream(PROMPTS[0], GREEDY)
        next(stream)
        check_shape(written(trace))  # in the middle
        stream.close()
    data = written(trace)
    check_shape(data)
    (begin,) = of_kind(data, "b", "request 0")
    assert begin["args"]["finish_reasons"] == ["abort"]


def test_on_step_gets_the_engine_and_the_times():
    calls = []
    with open_llm(lambda *args: calls.append(args)) as llm:
        llm.generate(PROMPTS, GREEDY)
        assert len(calls) == llm.engine.stats().num_steps
        assert all(engine is llm.engine and start <= end for engine, start, end in calls)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_failing_on_step_leaves_a_usable_engine(error):
    fail_at = None

    def on_step(engine, start, end):
        if engine.stats().num_steps == fail_at:
            raise error("on purpose")

    with open_llm(on_step) as llm:
        expected = [result.outputs[0].token_ids for result in llm.generate(PROMPTS, GREEDY)]
        for after in (1, 4, GREEDY.max_tokens):  # of which the last is the step that finishes all
            other = llm.stream([7, 8, 9], GREEDY)
            next(other)
            fail_at = llm.engine.stats().num_steps + after
            with pytest.raises(error, match="on purpose"):
                llm.generate(PROMPTS, GREEDY)
            rest = [output.outputs[0].token_ids for output in other]
            assert len(rest[-1]) == GREEDY.max_tokens  # it isn't the failed call's
            assert llm.engine.audit() == []
            assert llm.engine.stats().num_used_blocks == 0
            assert not llm.engine.has_unfinished_requests()
            assert [result.outputs[0].token_ids for result in llm.generate(PROMPTS, GREEDY)] == expected
