"""How long an operation takes on the GPU, and how near that is to what the memory gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cupaged.backends.base import Backend
from cupaged.benchmark.figures import Row, spread
from cupaged.benchmark.kernel_cases import Case, random_array
from cupaged.errors import OutOfMemoryError
from cupaged.kernels.checks import VECTOR_BYTES, ceil_div
from cupaged.kernels.partial_sums import num_partial_sums, partial_sums

CEILING_BYTES = 2 << 30  # that the ceilings are measured on: far more than any cache holds
MOSTLY_READ = 0.1  # an operation that writes less than this share of its bytes is held against the read ceiling
SAMPLE_US = 2000  # of a measurement, so that neither the clock's steps nor a graph's start show


@dataclass
class Timing:
    """us: device time of a launch in microseconds, once a measurement. host_us: what the host takes to launch it."""

    us: list[float]
    host_us: float


class Timer(Protocol):
    def __call__(self, launch: Callable[[int], None], num_sets: int) -> Timing:
        """Time launch(0), launch(1), ...: one operation each, on set i % num_sets of its arrays."""


class GraphTimer:
    """Times launches on the current GPU by events around a graph of many, so that the host has no part in it.

    What a launch costs inside a graph counts: it does in a decode step as well.
    """

    def __init__(self, repeats: int):
        import cupy

        self._cupy = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._repeats = repeats
        self.l2_bytes: int = cupy.cuda.Device().attributes["L2CacheSize"]

    def __call__(self, launch: Callable[[int], None], num_sets: int) -> Timing:
        self._cupy.cuda.Device().synchronize()  # the arrays were filled on another stream
        with self.stream:
            launch(0)  # loads the kernel, which a capture doesn't take
            self.stream.synchronize()

            def launch_all(count: int) -> None:
                for i in range(count):
                    launch(i)

            start = time.perf_counter()
            launch_all(num_sets)
            host_us = (time.perf_counter() - start) * 1e6 / num_sets

            once = self._elapsed_us(lambda: launch_all(num_sets))
            count = num_sets * ceil_div(SAMPLE_US, max(1, int(once)))
            self.stream.begin_capture()
            try:
                launch_all(count)
            finally:
                graph = self.stream.end_capture()
            samples = []
            for _ in range(self._repeats):
                graph.launch()  # keeps the GPU busy until the measured one stands in the queue
                samples.append(self._elapsed_us(graph.launch) / count)
        return Timing(samples, host_us)

    def _elapsed_us(self, work: Callable[[], object]) -> float:
        begin, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        begin.record(self.stream)
        work()
        end.record(self.stream)
        end.synchronize()
        return self._cupy.cuda.get_elapsed_time(begin, end) * 1e3


def measure_ceilings(backend: Backend, timer: Timer, num_bytes: int = CEILING_BYTES) -> dict[str, float]:
    """GB/s that the memory gives to a kernel that only reads, and to a copy, where bytes read and written count."""
    num_bytes = min(num_bytes, backend.memory_info()[0] // 4) // VECTOR_BYTES * VECTOR_BYTES
    src, dst = (random_array(backend, (num_bytes // 4,), np.float32) for _ in range(2))
    sums = backend.empty((num_partial_sums(),), np.float32)
    read = timer(lambda i: partial_sums(sums, src), 1)
    copy = timer(lambda i: backend.copy(dst, src), 1)
    return {
        name: count / spread(timing.us)["median"] / 1e3
        for name, timing, count in (("read", read, num_bytes), ("copy", copy, 2 * num_bytes))
    }


def time_cases(
    makers: Iterable[tuple[str, Callable[[], Case]]],
    timer: Timer,
    ceilings: dict[str, float],
    say: Callable[[str], None],
) -> list[Row]:
    """A row for each case that fits into memory; `say` hears of the others. makers: (family, what makes the case)."""
    rows = []
    for family, make in makers:
        try:
            case = make()
        except OutOfMemoryError as error:
            say(f"{family}: left out: {error}")
            continue
        timing = timer(case.launch, case.num_sets)
        rows.append({"family": family, "shape": case.shape, **_figures(case, timing, ceilings)})
        say(f"{family}, {case.shape}: {rows[-1]['us']['median']:.2f} us")
        del case  # and with it its arrays, before the next ones are made
    return rows


def _figures(case: Case, timing: Timing, ceilings: dict[str, float]) -> Row:
    us = spread(timing.us)
    num_bytes = case.bytes_read + case.bytes_written
    gb_per_s = num_bytes / us["median"] / 1e3
    ceiling = "read" if case.bytes_written < MOSTLY_READ * num_bytes else "copy"
    return {
        "us": us,
        "host_us": timing.host_us,
        "bytes": num_bytes,
        "flops": case.flops,
        "gb_per_s": gb_per_s,
        "ceiling": ceiling,
        "of_ceiling": gb_per_s / ceilings[ceiling],
        "tflop_per_s": case.flops / us["median"] / 1e6 if case.flops else None,
    }
