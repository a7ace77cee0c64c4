"""Latency, throughput and serving, measured at the engine: token ids in, token ids out, EOS ignored.

One output of a prompt is greedy; several are drawn at temperature 1.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from cupaged.backends.base import Backend
from cupaged.benchmark.figures import Row, distribution, spread
from cupaged.benchmark.workload import Workload
from cupaged.engine.engine import Engine
from cupaged.errors import CupagedError
from cupaged.outputs import RequestOutput
from cupaged.sampling_params import RequestOutputKind, SamplingParams

Say = Callable[[str], None]

NUM_WARM_UP_REQUESTS = 8  # of `serve`


@dataclass
class Run:
    """All requests of a workload, added at once. Times in seconds on time.monotonic()'s clock."""

    start: float
    step_ends: list[float]
    outputs: list[RequestOutput]  # in the order of the requests

    @property
    def seconds(self) -> float:
        return self.step_ends[-1] - self.start

    @property
    def num_output_tokens(self) -> int:
        return sum(len(completion.token_ids) for output in self.outputs for completion in output.outputs)

    @property
    def seconds_to_first_tokens(self) -> float:
        """Until every request has its first token."""
        return max(output.metrics.first_token_time for output in self.outputs) - self.start

    @property
    def seconds_a_decode_step(self) -> float | None:
        """Mean over the steps in which all requests decode: between the last one's first token and the first one's
        last. None when there is no such step."""
        first = bisect_left(self.step_ends, max(output.metrics.first_token_time for output in self.outputs))
        last = bisect_left(self.step_ends, min(output.metrics.finished_time for output in self.outputs))
        return (self.step_ends[last] - self.step_ends[first]) / (last - first) if last > first else None


def run_together(engine: Engine, workload: Workload, turn: int = 0) -> Run:
    """Raises ValueError for a request that can't be run, CupagedError when one didn't give what was asked for."""
    prompts = workload.prompts(engine.model.vocab_size, turn)
    start, step_ends, outputs = time.monotonic(), [], {}
    for i, (prompt, (_, output_len)) in enumerate(zip(prompts, workload.sizes, strict=True)):
        engine.add_request(str(i), prompt, _params(output_len, RequestOutputKind.FINAL_ONLY, workload.n))
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs[int(output.request_id)] = output
        step_ends.append(time.monotonic())
    run = Run(start, step_ends, [outputs[i] for i in range(len(prompts))])
    _check_all_came(run.num_output_tokens, workload)
    return run


def latency(
    engine: Engine,
    batches: Sequence[int],
    *,
    prompt_len: int,
    output_len: int,
    repeats: int,
    warmup: int,
    seed: int = 0,
    say: Say,
) -> list[Row]:
    """For each batch size: requests that start together and are equally long.

    ttft_ms: until all have their first token. decode_step_ms: a step in which all decode, at batch 1 the time a token
    takes; the mean of a run. linear_share, on the CPU: of one more run's time, the part spent in matrix products.
    """
    rows = []
    for i, batch in enumerate(batches):
        if batch > engine.scheduler.max_num_seqs:
            raise ValueError(
                f"--batch: {batch} is more than the {engine.scheduler.max_num_seqs} sequences that run at once; "
                "raise --max-num-seqs"
            )
        first_seed = seed + i * (repeats + warmup + 1)  # no two runs have prompts in common
        workload = Workload.uniform(batch, prompt_len, output_len, first_seed)
        runs = _repeat(engine, workload, repeats, warmup, say, f"batch {batch}")
        steps = [run.seconds_a_decode_step for run in runs]
        row: Row = {
            "batch": batch,
            "prompt_len": prompt_len,
            "output_len": output_len,
            "output_tokens": runs[0].num_output_tokens,
            "ttft_ms": spread([run.seconds_to_first_tokens * 1e3 for run in runs]),
            "decode_step_ms": spread([step * 1e3 for step in steps if step is not None]),
            "output_tokens_per_s": spread([run.num_output_tokens / run.seconds for run in runs]),
        }
        if engine.backend.name == "cpu":
            with timed_linear(engine.backend) as spent:
                run = run_together(engine, workload, turn=repeats + warmup)
            row["linear_share"] = spent.seconds / run.seconds
        rows.append(row)
    return rows


def throughput(engine: Engine, workload: Workload, *, repeats: int, warmup: int, say: Say) -> Row:
    """The requests all at once: tokens a second from the first request's arrival to the last token."""
    runs = _repeat(engine, workload, repeats, warmup, say, f"{len(workload.sizes)} requests")
    return {
        "requests": len(workload.sizes),
        "prompt_tokens": workload.num_prompt_tokens,
        "output_tokens": runs[0].num_output_tokens,
        "seconds": spread([run.seconds for run in runs]),
        "requests_per_s": spread([len(workload.sizes) / run.seconds for run in runs]),
        "prompt_tokens_per_s": spread([workload.num_prompt_tokens / run.seconds for run in runs]),
        "output_tokens_per_s": spread([run.num_output_tokens / run.seconds for run in runs]),
    }


def serve(engine: Engine, workload: Workload, *, request_rate: float, say: Say) -> Row:
    """The requests as they come, in this process: between two steps the engine gets those that have arrived.

    Times count from a request's arrival, whether the engine was free to take it or not. itl_ms: between two tokens of
    a request. normalized_ms: from arrival to the last token, a generated token.
    """
    arrivals = workload.arrivals(request_rate)
    prompts = workload.prompts(engine.model.vocab_size)
    run_together(engine, workload.first(NUM_WARM_UP_REQUESTS), turn=1)
    say(f"{len(arrivals)} requests over {arrivals[-1]:.1f} s")

    token_times: list[list[float]] = [[] for _ in prompts]
    num_added, start = 0, time.monotonic()
    while num_added < len(prompts) or engine.has_unfinished_requests():
        now = time.monotonic() - start
        while num_added < len(prompts) and arrivals[num_added] <= now:
            params = _params(workload.sizes[num_added][1], RequestOutputKind.DELTA)
            engine.add_request(str(num_added), prompts[num_added], params)
            num_added += 1
        if not engine.has_unfinished_requests():
            time.sleep(max(0.0, start + arrivals[num_added] - time.monotonic()))
            continue
        outputs = engine.step()
        now = time.monotonic() - start
        for output in outputs:
            for completion in output.outputs:
                token_times[int(output.request_id)] += [now] * len(completion.token_ids)

    num_output_tokens = sum(map(len, token_times))
    _check_all_came(num_output_tokens, workload)
    seconds = max(times[-1] for times in token_times)
    by_request = list(zip(arrivals, token_times, strict=True))
    return {
        "requests": len(prompts),
        "request_rate": request_rate,
        "prompt_tokens": workload.num_prompt_tokens,
        "output_tokens": num_output_tokens,
        "seconds": seconds,
        "output_tokens_per_s": num_output_tokens / seconds,
        "ttft_ms": distribution([(times[0] - arrival) * 1e3 for arrival, times in by_request]),
        "itl_ms": distribution([(b - a) * 1e3 for times in token_times for a, b in pairwise(times)]),
        "normalized_ms": distribution([(times[-1] - arrival) * 1e3 / len(times) for arrival, times in by_request]),
    }


def check_fits(engine: Engine, workload: Workload) -> None:
    """Raise ValueError for a request that would be cut short."""
    for i, (prompt_len, output_len) in enumerate(workload.sizes):
        if prompt_len + output_len > engine.max_model_len:
            raise ValueError(
                f"request {i}: {prompt_len} + {output_len} tokens are more than the {engine.max_model_len} that a "
                "sequence may have; make it shorter, or raise --max-model-len or --kv-cache-memory"
            )


class Stopwatch:
    seconds = 0.0


@contextmanager
def timed_linear(backend: Backend) -> Iterator[Stopwatch]:
    """While this lasts, a clock runs around each call of backend.linear, which must have done its work on return."""
    watch, linear = Stopwatch(), backend.linear

    def timed(*args, **kwargs) -> None:
        start = time.perf_counter()
        linear(*args, **kwargs)
        watch.seconds += time.perf_counter() - start

    backend.linear = timed
    try:
        yield watch
    finally:
        del backend.linear  # the instance's; the class's shows again


def _repeat(engine: Engine, workload: Workload, repeats: int, warmup: int, say: Say, what: str) -> list[Run]:
    """`repeats` runs after `warmup` others. The first that counts has the prompts that the workload's seed names."""
    check_fits(engine, workload)
    for i in range(warmup):
        run = run_together(engine, workload, turn=repeats + i)
        say(f"{what}: warm-up took {run.seconds:.2f} s")
    runs = []
    for turn in range(repeats):
        runs.append(run_together(engine, workload, turn))
        say(f"{what}: repeat {turn + 1} of {repeats} took {runs[-1].seconds:.2f} s")
    return runs


def _params(output_len: int, kind: RequestOutputKind, n: int = 1) -> SamplingParams:
    temperature = 0.0 if n == 1 else 1.0
    return SamplingParams(
        n=n, temperature=temperature, max_tokens=output_len, ignore_eos=True, detokenize=False, output_kind=kind
    )


def _check_all_came(num_output_tokens: int, workload: Workload) -> None:
    if num_output_tokens != workload.num_output_tokens:
        raise CupagedError(
            f"{num_output_tokens} tokens came where {workload.num_output_tokens} were asked for: requests ended early"
        )
