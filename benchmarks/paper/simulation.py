"""The engine's scheduler at work on a trace, with a clock in place of the model."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cupaged.benchmark.workload import Workload
from cupaged.engine.block_manager import BlockManager
from cupaged.engine.block_pool import BlockPool
from cupaged.engine.prefix import PrefixHasher
from cupaged.engine.scheduler import Schedule, Scheduler
from cupaged.engine.sequence import Request
from cupaged.sampling_params import SamplingParams

from .contiguous import RESERVATIONS, ContiguousBlocks
from .step_time import KV_BYTES_PER_TOKEN, StepTime

NUM_SLOTS = 12 * 2**30 // KV_BYTES_PER_TOKEN  # of the paper's 12 GB: 15.7K
BLOCK_SIZE = 16
PAGED = "paged"
POLICIES = (*RESERVATIONS, PAGED)
MAX_NUM_SEQS = 256
MAX_NUM_BATCHED_TOKENS = 2048
WARM_UP = 0.2


@dataclass
class Means:
    """Sums over time of what a step has, each weighted by the step's duration. Slots are of the whole cache."""

    seconds: float = 0.0
    requests: float = 0.0  # in the batch
    filled: float = 0.0  # slots that hold a token
    reserved: float = 0.0  # contiguous: slots that the request's own later tokens will fill
    overreserved: float = 0.0  # contiguous: slots reserved that it will never fill
    used: float = 0.0  # paged: slots of the blocks in use
    references: float = 0.0  # paged: slots that would be in use if no block were shared
    finished: int = 0  # requests

    def mean(self, name: str) -> float:
        return getattr(self, name) / self.seconds

    @property
    def sharing(self) -> float:
        """The share of blocks saved: figure 15 of the paper."""
        return 1 - self.used / self.references

    @property
    def waste(self) -> float:
        """The share of the used blocks' slots that holds no token."""
        return 1 - self.filled / self.used

    @property
    def throughput(self) -> float:
        """Requests a second."""
        return self.finished / self.seconds


@dataclass
class Run:
    """What came of a trace. normalized_latency: of each request, seconds from its arrival to its end for each output
    token."""

    normalized_latency: np.ndarray
    seconds: float = 0.0
    num_steps: int = 0
    num_preemptions: int = 0
    num_copies: int = 0
    means: Means = field(default_factory=Means)


class Simulation:
    """Requests end after as many tokens as the trace says.

    policy: PAGED, or one of RESERVATIONS. prefix_caching, watermark: of PAGED, as in the engine.
    warm_up: means are taken from when this share of the requests has finished to when the last one is admitted; None
        takes them over the whole run.
    """

    def __init__(
        self,
        policy: str,
        step_time: StepTime,
        *,
        num_slots: int = NUM_SLOTS,
        block_size: int = BLOCK_SIZE,
        prefix_caching: bool = False,
        watermark: int = 1,
        warm_up: float | None = WARM_UP,
    ):
        self.step_time = step_time
        self.warm_up = warm_up
        self.is_paged = policy == PAGED
        if self.is_paged:
            pool = BlockPool(grow=lambda: 0)
            pool.add_blocks(num_slots // block_size)
            self.blocks = BlockManager(pool, block_size, PrefixHasher(block_size) if prefix_caching else None)
        else:
            self.blocks = ContiguousBlocks(num_slots, RESERVATIONS[policy])
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
            watermark=watermark,
        )

    def run(self, workload: Workload, rate: float | None = None, prefix: list[int] | None = None) -> Run:
        """Run the trace to its end.

        rate: Poisson arrivals, requests/s; None lets all arrive at the start.
        prefix: tokens that every prompt begins with, in front of what the trace says.
        """
        arrivals = [0.0] * len(workload.sizes) if rate is None else workload.arrivals(rate)
        requests = self._requests(workload, arrivals, prefix or [])
        scheduler, means = self.scheduler, Means()
        latency = np.zeros(len(requests))
        now, num_arrived, num_finished, num_steps = 0.0, 0, 0, 0
        while num_finished < len(requests):
            if not scheduler.running and not scheduler.waiting:
                now = max(now, arrivals[num_arrived])
            while num_arrived < len(requests) and arrivals[num_arrived] <= now:
                scheduler.add(requests[num_arrived])
                num_arrived += 1

            step = scheduler.schedule()
            assert not step.failed
            cached = sum([seq.num_cached_tokens for seq in step.sequences])
            seconds = self.step_time(len(step.sequences), sum(step.num_tokens), cached)
            scheduler.complete(step)
            now += seconds
            num_steps += 1
            measured = self.warm_up is None or (
                num_finished >= self.warm_up * len(requests) and (num_arrived < len(requests) or scheduler.waiting)
            )
            if measured:
                self._measure(means, seconds)
            for request in self._take_tokens(step):
                latency[int(request.request_id)] = (now - request.metrics.arrival_time) / (
                    request.max_len - request.num_prompt_tokens
                )
                num_finished += 1
                means.finished += bool(measured)
        num_copies = self.blocks.num_copies if self.is_paged else 0
        return Run(latency, now, num_steps, scheduler.num_preemptions, num_copies, means)

    def _requests(self, workload: Workload, arrivals: list[float], prefix: list[int]) -> list[Request]:
        params = SamplingParams(n=workload.n, max_tokens=None)
        requests = []
        for i, (num_prompt, num_output) in enumerate(workload.sizes):
            # No two prompts are alike behind the prefix.
            prompt = prefix + [i] * num_prompt
            max_len = len(prompt) + num_output
            requests.append(Request(str(i), None, prompt, params, 0, arrivals[i], max_len=max_len))
        return requests

    def _take_tokens(self, step: Schedule) -> list[Request]:
        """A token for each sequence that is due one; returns the requests that have ended with it."""
        finished = []
        for _, seq in step.sampled:
            seq.token_ids.append(0)
            request = seq.request
            if len(seq.token_ids) >= request.max_len:
                self.scheduler.finish(seq, "length")
                if request.finished:
                    finished.append(request)
        return finished

    def _measure(self, means: Means, seconds: float) -> None:
        active = [seq for request in self.scheduler.running for seq in request.active]
        means.seconds += seconds
        means.requests += seconds * len(self.scheduler.running)
        if self.is_paged:
            pool, block_size = self.blocks.pool, self.blocks.block_size
            used = (pool.num_blocks - pool.num_free_blocks) * block_size
            # Only at a sequence's end are slots unfilled, and those that share an end have filled it equally.
            unfilled = {
                seq.block_table[-1]: len(seq.block_table) * block_size - seq.num_cached_tokens for seq in active
            }
            means.used += seconds * used
            means.references += seconds * pool.num_references * block_size
            means.filled += seconds * (used - sum(unfilled.values()))
        else:
            filled = sum([seq.num_cached_tokens for seq in active])
            final = sum([seq.request.max_len for seq in active])
            reserved = sum([self.blocks.num_reserved(seq) for seq in active])
            means.filled += seconds * filled
            means.reserved += seconds * (final - filled)
            means.overreserved += seconds * (reserved - final)
