"""The arithmetic of latencies, over an engine whose steps take as long as the test says."""

from types import SimpleNamespace

import pytest

from cupaged.benchmark import generation
from cupaged.benchmark.generation import Run, run_together, serve, timed_linear
from cupaged.benchmark.workload import Workload
from cupaged.errors import CupagedError
from cupaged.outputs import CompletionOutput, RequestMetrics, RequestOutput
from cupaged.sampling_params import RequestOutputKind


class Clock:
    """Time that passes when somebody sleeps or a step runs."""

    now = 1000.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= 0
        self.now += seconds


class ScriptedEngine:
    """A step takes a second and gives every request that is there a token. lose: a request that ends one too early."""

    max_model_len = 100
    model = SimpleNamespace(vocab_size=50)
    scheduler = SimpleNamespace(max_num_seqs=8)
    backend = SimpleNamespace(name="cuda")

    def __init__(self, clock, lose=None):
        self.clock, self.lose = clock, lose
        self.params, self.given, self.added = {}, {}, []

    def add_request(self, request_id, prompt, params):
        assert params.ignore_eos
        assert params.greedy
        self.params[request_id], self.given[request_id] = params, []
        self.added.append((request_id, self.clock.now, prompt))

    def has_unfinished_requests(self):
        return bool(self.params)

    def step(self):
        assert self.params
        self.clock.now += 1
        outputs = []
        for request_id, params in list(self.params.items()):
            times = self.given[request_id]
            times.append(self.clock.now)
            finished = len(times) == params.max_tokens - (request_id == self.lose)
            if finished:
                del self.params[request_id]
            is_delta = params.output_kind is RequestOutputKind.DELTA
            if is_delta or finished:
                completion = CompletionOutput(0, "", [1] if is_delta else [1] * len(times))
                metrics = RequestMetrics(0.0, None, times[0], times[-1])
                outputs.append(RequestOutput(request_id, None, [], [completion], finished, metrics))
        return outputs


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(generation, "time", clock)
    return clock


def test_serving_times_count_from_the_arrival(clock, monkeypatch):
    monkeypatch.setattr(Workload, "arrivals", lambda self, rate: [0.5, 0.75, 10.0])
    engine = ScriptedEngine(clock)
    workload = Workload(((4, 3), (2, 2), (1, 1)), seed=1)
    row = serve(engine, workload, request_rate=2.0, say=lambda line: None)

    # The warm-up took 3 s. Request 0 is added at 0.5 and gets tokens at 1.5, 2.5, 3.5; request 1 waits for the end of
    # the step that runs at 0.75: added at 1.5, tokens at 2.5, 3.5; request 2 is alone: added at 10, a token at 11.
    start = 1000.0 + 3
    assert [(i, at - start) for i, at, _ in engine.added[3:]] == [("0", 0.5), ("1", 1.5), ("2", 10.0)]
    assert [prompt for _, _, prompt in engine.added[3:]] == workload.prompts(50)
    assert not {tuple(p) for _, _, p in engine.added[:3]} & {tuple(p) for _, _, p in engine.added[3:5]}
    ttfts, itls, normalized = [1.0, 1.75, 1.0], [1.0, 1.0, 1.0], [3.0 / 3, 2.75 / 2, 1.0]
    assert (row["ttft_ms"]["count"], row["itl_ms"]["count"], row["normalized_ms"]["count"]) == (3, 3, 3)
    assert row["ttft_ms"]["mean"] == pytest.approx(1e3 * sum(ttfts) / 3)
    assert row["ttft_ms"]["max"] == pytest.approx(1750)
    assert (row["itl_ms"]["p50"], row["itl_ms"]["mean"]) == pytest.approx((1000, 1e3 * sum(itls) / 3))
    assert row["normalized_ms"]["mean"] == pytest.approx(1e3 * sum(normalized) / 3)
    assert row["normalized_ms"]["p50"] == pytest.approx(1000)
    assert (row["output_tokens"], row["seconds"]) == (6, pytest.approx(11.0))


def run_of(step_ends, first_token_times, finished_times):
    outputs = [
        RequestOutput(str(i), None, [], [], True, RequestMetrics(0.0, None, first, finished))
        for i, (first, finished) in enumerate(zip(first_token_times, finished_times, strict=True))
    ]
    return Run(0.0, step_ends, outputs)


def test_a_decode_step_is_one_in_which_all_requests_decode():
    # Two steps of prompts (2 s, 3 s), three of decoding (1 s each), one with what the first request left to do (0.5 s).
    # Tokens are there shortly before a step ends.
    run = run_of([2.0, 5.0, 6.0, 7.0, 8.0, 8.5], [1.99, 4.99], [7.99, 8.49])
    assert run.seconds == 8.5
    assert run.seconds_to_first_tokens == pytest.approx(4.99)
    assert run.seconds_a_decode_step == pytest.approx(1.0)
    assert run_of([2.0, 5.0], [1.99, 4.99], [1.99, 4.99]).seconds_a_decode_step is None


def test_tokens_that_did_not_come_are_an_error(clock):
    workload = Workload.uniform(2, prompt_len=3, output_len=1)
    assert run_together(ScriptedEngine(clock), workload).num_output_tokens == 2
    workload = Workload.uniform(2, prompt_len=3, output_len=2)
    with pytest.raises(CupagedError, match="tokens came where 4 were asked for"):
        run_together(ScriptedEngine(clock, lose="1"), workload)


def test_the_clock_around_linear_goes_away():
    class Backend:
        def linear(self, out, x, weight, bias=None):
            out.append(x)

    backend, out = Backend(), []
    with timed_linear(backend) as watch:
        backend.linear(out, 1, 2, bias=3)
        backend.linear(out, 4, 5)
    assert out == [1, 4]
    assert watch.seconds > 0
    assert "linear" not in vars(backend)
