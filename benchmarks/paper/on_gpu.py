"""Throughput and latency under paging and under contiguous reservation, measured on the engine with the same kernels.

    cd benchmarks && python -m paper.on_gpu -m configs/llama-3.1-8b.json --load-format dummy --json FILE

The engine is the real one, and so is the cache; under a contiguous policy a request is only admitted when a region of
the size that it reserves is free as well. The cache has as many slots as the paper's, 15,728, so that memory is what
requests wait for. Prompts are random token ids in the lengths of the ShareGPT trace; EOS is ignored.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engines import Report, add_model_arguments, engine_with

from cupaged import LLM
from cupaged.benchmark import generation
from cupaged.benchmark.workload import FIRST_ID, Workload
from cupaged.engine.block_manager import BlockManager
from cupaged.engine.block_pool import Block
from cupaged.engine.engine import Engine
from cupaged.engine.sequence import Sequence
from cupaged.sampling_params import SamplingParams

from .contiguous import RESERVATIONS, BuddyAllocator
from .experiments import MEAN_RUNNING_TOKENS
from .simulation import NUM_SLOTS, PAGED, POLICIES
from .traces import MAX_LEN, SHAREGPT

LOADS = (0.7, 0.9, 1.1)  # shares of a policy's saturated throughput at which requests come
SWAP_BLOCK_SIZES = (8, 16, 32, 64)


class ReservedBlocks(BlockManager):
    """The engine's blocks, for requests with one output that each hold a contiguous region besides, sized by `reserve`,
    from admission to end. A region always has room for the request's blocks."""

    def __init__(self, blocks: BlockManager, reserve: Callable[[int, int], int]):
        super().__init__(blocks.pool, blocks.block_size, hasher=None, window=blocks.window)
        self._allocator = BuddyAllocator(NUM_SLOTS)
        self._reserve = reserve
        self._regions: dict[Sequence, tuple[int, int]] = {}

    def admit(self, seq: Sequence, found: list[Block], num_tokens: int, spare: int, limit: int) -> bool:
        num_prompt, max_len = seq.request.num_prompt_tokens, seq.request.max_len
        size = num_prompt + self._reserve(max_len - num_prompt, num_prompt)
        region = self._allocator.allocate(max(size, self.block_size))
        if region is None:
            return False
        self._regions[seq] = region
        return super().admit(seq, found, num_tokens, 0, limit)

    def free(self, seq: Sequence) -> None:
        super().free(seq)
        self._allocator.free(*self._regions.pop(seq))


@contextmanager
def engine_under(llm: LLM, policy: str) -> Iterator[Engine]:
    with engine_with(
        llm,
        kv_cache_memory_bytes=NUM_SLOTS * llm.engine.arena.layout.bytes_per_token,
        enable_prefix_caching=False,
        preemption_mode="recompute",
    ) as engine:
        if policy != PAGED:
            engine.blocks = engine.scheduler.blocks = ReservedBlocks(engine.blocks, RESERVATIONS[policy])
        yield engine


def saturation(llm: LLM, policy: str, workload: Workload) -> dict:
    """Requests a second while requests wait: those that end between the first fifth's end and the last one's admission.
    And the mean batch of the whole run."""
    with engine_under(llm, policy) as engine:
        generation.run_together(engine, workload.first(len(workload.sizes) // 3), turn=1)  # captures graphs
        before = engine.stats()
        outputs = generation.run_together(engine, workload).outputs
        stats = engine.stats()
        ends = sorted(output.metrics.finished_time for output in outputs)
        first, last = ends[len(ends) // 5], max(output.metrics.first_scheduled_time for output in outputs)
        num_tokens = stats.num_output_tokens - before.num_output_tokens
        return {
            "requests_per_s": sum(first < end <= last for end in ends) / (last - first),
            "mean_batch": num_tokens / (stats.num_steps - before.num_steps),
            "preemptions": stats.num_preemptions - before.num_preemptions,
        }


def latencies(llm: LLM, policy: str, workload: Workload, rates: list[float]) -> list[dict]:
    """Milliseconds from a request's arrival to its end, for each output token, at these request rates."""
    with engine_under(llm, policy) as engine:
        rows = [generation.serve(engine, workload, request_rate=rate, say=lambda _: None) for rate in rates]
    return [{"rate": row["request_rate"], **row["normalized_ms"]} for row in rows]


def preemption(llm: LLM, block_size: int, repeats: int = 5) -> dict[str, float]:
    """Figure 19 (a): by how many milliseconds a request of average length is later with its next token when it was
    preempted and computes again what it had, or is swapped out and in."""
    result = {}
    for mode in ("recompute", "swap"):
        options = {"block_size": block_size, "preemption_mode": mode, "async_scheduling": False}
        with engine_with(llm, enable_prefix_caching=False, **options) as engine:
            params = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True, detokenize=False)
            engine.add_request("x", [FIRST_ID] * MEAN_RUNNING_TOKENS, params)

            def seconds() -> float:
                start = time.perf_counter()
                engine.step()
                return time.perf_counter() - start

            losses = []
            for _ in range(2 + repeats):
                usual = statistics.median(seconds() for _ in range(5))
                engine.scheduler.preempt(engine.scheduler.running[0])
                losses.append(seconds() - usual)
            result[mode] = statistics.median(losses[2:]) * 1e3
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--num-requests", type=int, default=300)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--loads", type=float, nargs="*", default=LOADS)
    arguments = parser.parse_args()
    workload = SHAREGPT.workload(arguments.num_requests)
    with LLM(arguments.model, load_format=arguments.load_format, device=arguments.device, max_model_len=MAX_LEN) as llm:
        report = Report(llm, arguments)
        report.add("num_requests", arguments.num_requests)
        report.add("preemption", {size: preemption(llm, size) for size in SWAP_BLOCK_SIZES})
        for policy in reversed(arguments.policies):  # paging first: it takes the least time
            saturated = saturation(llm, policy, workload)
            report.add(f"saturation, {policy}", saturated)
            rates = [load * saturated["requests_per_s"] for load in arguments.loads]
            report.add(f"latency, {policy}", latencies(llm, policy, workload, rates))


if __name__ == "__main__":
    main()
