"""Each experiment of the paper as a function that returns plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from .beams import StandInModel, beam_sharing
from .preemption import batched_swap_seconds, recompute_seconds, swap_seconds
from .simulation import NUM_SLOTS, PAGED, POLICIES, Run, Simulation
from .step_time import A100_13B, UNIT
from .traces import ALPACA, CHATBOT, SHAREGPT, TRANSLATION, Lengths

RATES = {"ShareGPT": 2.0, "Alpaca": 30.0}  # requests/s in figure 13 of the paper
WIDTHS = (2, 4, 6)
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PREFIXES = {"1-shot": 80, "5-shot": 341}  # tokens
OUTPUT_SIGMAS = (0.6, 0.75, 0.9, 1.05)
WATERMARKS = (0, 1, 2)
# Of the stand-in model in beam search. 0.7 makes width 2 on Alpaca save what the paper's does; the rest follows.
CONFIDENCE = 0.7
CONFIDENCES = (0.5, CONFIDENCE, 0.9, 0.97)
# Shares of a policy's saturated throughput at which its latency is taken.
LOADS = (0.3, 0.6, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
# (statistic over requests, seconds for each output token) at which request rates are compared
LATENCY_LEVELS = (("mean", 0.1), ("mean", 0.2), ("p50", 0.1), ("p99", 1.0))
MEAN_RUNNING_TOKENS = 458  # of a request that runs, by the paper's figures for Orca (Max)


def run_all() -> dict[str, Any]:
    """All experiments."""

    def each(experiment: Callable[[Lengths, int], Any], num_sharegpt: int, num_alpaca: int) -> dict[str, Any]:
        """An experiment on both datasets, with so many requests."""
        return {"ShareGPT": experiment(SHAREGPT, num_sharegpt), "Alpaca": experiment(ALPACA, num_alpaca)}

    def by(values: Iterable, experiment: Callable[..., Any]) -> Callable[[Lengths, int], dict]:
        """An experiment for each of several values of its last argument."""
        return lambda lengths, count: {str(value): experiment(lengths, count, value) for value in values}

    return {
        "lengths": each(lengths_of, 5000, 5000),
        "batches": each(batches, 3600, 6000),
        "saturation": each(saturation, 1000, 4000),
        "sigma": {str(sigma): output_sigma(sigma, 600) for sigma in OUTPUT_SIGMAS},
        "parallel_sampling": each(by(WIDTHS, parallel_sampling), 300, 1500),
        "beam_search": {
            str(confidence): each(by(WIDTHS, partial(beam_search, confidence=confidence)), 60, 300)
            for confidence in CONFIDENCES
        },
        "shared_prefix": {name: shared_prefix(length, 3000) for name, length in PREFIXES.items()},
        "chatbot": chatbot(600),
        "latency": each(latency, 1500, 4000),
        "block_sizes": each(by(BLOCK_SIZES, block_size), 500, 2000),
        "watermark": each(by(WATERMARKS, watermark), 600, 3000),
        "preemption": {str(size): preemption(size) for size in BLOCK_SIZES},
    }


def lengths_of(lengths: Lengths, num_requests: int) -> dict[str, dict[str, float]]:
    """Statistics of a trace."""
    sizes = np.array(lengths.workload(num_requests).sizes)
    return {
        part: {
            "mean": values.mean(),
            "median": float(np.median(values)),
            "p99": float(np.percentile(values, 99)),
            "max": float(values.max()),
        }
        for part, values in (("prompt", sizes[:, 0]), ("output", sizes[:, 1]))
    }


def occupancy(run: Run) -> dict[str, float]:
    """Shares of the whole cache; for paging, "of_used" is the share of the blocks in use that holds tokens."""
    means = run.means
    shares = {name: means.mean(name) / NUM_SLOTS for name in ("filled", "reserved", "overreserved")}
    if means.used:
        shares["of_used"] = 1 - means.waste
    return shares


def batches(lengths: Lengths, num_requests: int) -> dict[str, dict[str, float]]:
    """Figures 2 and 13: requests in the batch and what the cache holds, at a fixed request rate."""
    result = {}
    for policy in POLICIES:
        run = Simulation(policy, A100_13B).run(lengths.workload(num_requests), RATES[lengths.name])
        result[policy] = {"requests": run.means.mean("requests"), **occupancy(run)}
    return result


def saturation(lengths: Lengths, num_requests: int) -> dict[str, dict[str, float]]:
    """The same when requests always wait, and the throughput; also with the host's time left out."""
    result = {}
    for policy in POLICIES:
        run = Simulation(policy, A100_13B).run(lengths.workload(num_requests))
        no_host = Simulation(policy, replace(A100_13B, fixed=0.0, per_sequence=0.0)).run(lengths.workload(num_requests))
        result[policy] = {
            "requests": run.means.mean("requests"),
            "throughput": run.means.throughput,
            "throughput_without_host": no_host.means.throughput,
            **occupancy(run),
        }
    return result


def output_sigma(sigma: float, num_requests: int) -> dict[str, dict[str, float]]:
    """How much hangs on the spread of ShareGPT's output lengths."""
    workload = replace(SHAREGPT, sigma_output=sigma).workload(num_requests)
    result = {}
    for policy in POLICIES:
        run = Simulation(policy, A100_13B).run(workload)
        result[policy] = {"requests": run.means.mean("requests"), **occupancy(run)}
    return result


def parallel_sampling(lengths: Lengths, num_requests: int, n: int) -> dict[str, float]:
    """Figure 15 (a): the share of blocks saved when the outputs of a request share its prompt, over all steps of all
    requests, with memory for all of them. And how they fare in the paper's memory, requests always waiting."""
    workload = lengths.workload(num_requests, n=n)
    run = Simulation(PAGED, UNIT, num_slots=10 * NUM_SLOTS, warm_up=None).run(workload)
    full = Simulation(PAGED, A100_13B).run(workload)
    return {
        "saved": run.means.sharing,
        "copies_per_request": run.num_copies / num_requests,
        "throughput": full.means.throughput,
        "preemptions_per_request": full.num_preemptions / num_requests,
    }


def beam_search(lengths: Lengths, num_requests: int, width: int, confidence: float = CONFIDENCE) -> float:
    """Figure 15 (b): the share of blocks saved when beams share what they have in common."""
    return beam_sharing(lengths.workload(num_requests), width, StandInModel(confidence))


def shared_prefix(num_tokens: int, num_requests: int) -> dict[str, dict[str, float]]:
    """Figure 16: saturated throughput when all prompts begin with the same tokens."""
    prefix = [-1] * num_tokens
    workload = TRANSLATION.workload(num_requests)
    result = {}
    for name, simulation in (
        ("Oracle", Simulation("Oracle", A100_13B)),
        ("paged, no sharing", Simulation(PAGED, A100_13B)),
        ("paged", Simulation(PAGED, A100_13B, prefix_caching=True)),
    ):
        means = simulation.run(workload, prefix=prefix).means
        result[name] = {"throughput": means.throughput, "requests": means.mean("requests")}
    return result


def chatbot(num_requests: int) -> dict[str, float]:
    """Figure 17: saturated throughput when prompts have 1024 tokens."""
    workload = CHATBOT.workload(num_requests)
    return {policy: Simulation(policy, A100_13B).run(workload).means.throughput for policy in POLICIES}


def latency(lengths: Lengths, num_requests: int) -> dict[str, Any]:
    """Figure 12: normalised latency against request rate, and the rate sustained at a given mean latency."""
    workload = lengths.workload(num_requests)
    curves = {}
    for policy in POLICIES:
        capacity = Simulation(policy, A100_13B).run(workload).means.throughput
        curve = []
        for load in LOADS:
            times = Simulation(policy, A100_13B).run(workload, load * capacity).normalized_latency
            p50, p99 = np.percentile(times, [50, 99])
            curve.append({"rate": load * capacity, "mean": times.mean(), "p50": p50, "p99": p99})
        curves[policy] = curve
    sustained = {
        f"{statistic} {level}": {policy: sustained_rate(curve, statistic, level) for policy, curve in curves.items()}
        for statistic, level in LATENCY_LEVELS
    }
    return {"curves": curves, "sustained": sustained}


def sustained_rate(curve: list[dict[str, float]], statistic: str, level: float) -> float | None:
    """The request rate at which this statistic of the normalised latency passes `level`, between the points of the
    curve (linear in the logarithm of the latency); None if it is outside."""
    for left, right in pairwise(curve):
        low, high = left[statistic], right[statistic]
        if low <= level <= high:
            return left["rate"] + np.log(level / low) / np.log(high / low) * (right["rate"] - left["rate"])
    return None


def block_size(lengths: Lengths, num_requests: int, size: int) -> dict[str, float]:
    """Figure 18 (b), as far as memory goes: saturated throughput, waste and sharing of a block size."""
    means = Simulation(PAGED, A100_13B, block_size=size).run(lengths.workload(num_requests)).means
    sampling = Simulation(PAGED, UNIT, num_slots=10 * NUM_SLOTS, block_size=size, warm_up=None)
    sampled = sampling.run(lengths.workload(num_requests // 4, n=4)).means
    return {
        "waste": means.waste,
        "requests": means.mean("requests"),
        "throughput": means.throughput,
        "saved_n_4": sampled.sharing,
    }


def watermark(lengths: Lengths, num_requests: int, mark: int) -> dict[str, float]:
    """The scheduler's reserve against thrash: blocks that an admission leaves free for each running sequence."""
    run = Simulation(PAGED, A100_13B, watermark=mark).run(lengths.workload(num_requests))
    return {
        "requests": run.means.mean("requests"),
        "throughput": run.means.throughput,
        "preemptions_per_request": run.num_preemptions / num_requests,
        **occupancy(run),
    }


def preemption(size: int) -> dict[str, float]:
    """Figure 19 (a): seconds to bring back one request of average length."""
    return {
        "recompute": recompute_seconds(MEAN_RUNNING_TOKENS),
        "swap": swap_seconds(MEAN_RUNNING_TOKENS, size),
        "batched_swap": batched_swap_seconds(MEAN_RUNNING_TOKENS, size),
    }
