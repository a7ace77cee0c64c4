"""Requests with the length statistics that the paper states."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cupaged.benchmark.workload import Workload

MAX_LEN = 2048  # OPT's context
GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Lengths:
    """Log-normal prompt and output lengths, in tokens, independent of each other.

    mean_*: as stated in the paper, and met exactly by each trace after clipping. sigma_*: of the logarithm; the paper
    has none, so they are ours. Prompts are clipped at max_prompt, outputs where prompt and output reach MAX_LEN.
    """

    name: str
    mean_prompt: float
    mean_output: float
    sigma_prompt: float
    sigma_output: float
    max_prompt: int = MAX_LEN // 2

    def workload(self, num_requests: int, seed: int = 0, n: int = 1) -> Workload:
        """Requests whose lengths are evenly spaced quantiles, paired so that each part of the prompts has the whole
        spread of outputs (a Kronecker sequence), in an order by chance: a short trace is as representative as a long
        one."""
        i = np.arange(num_requests)
        normal = statistics.NormalDist()
        quantiles = np.array([normal.inv_cdf(share) for share in (i + 0.5) / num_requests])
        rng = np.random.default_rng(seed)
        order = rng.permutation(num_requests)
        partners = (i * GOLDEN_RATIO % 1).argsort().argsort()
        prompts = _with_mean(
            self.mean_prompt,
            np.exp(self.sigma_prompt * quantiles[order]),
            lambda lengths: np.clip(lengths, 1, self.max_prompt),
        )
        outputs = _with_mean(
            self.mean_output,
            np.exp(self.sigma_output * quantiles[partners[order]]),
            lambda lengths: np.clip(lengths, 1, MAX_LEN - prompts),
        )
        return Workload(tuple(zip(prompts.tolist(), outputs.tolist(), strict=True)), seed, n)


def _with_mean(mean: float, shape: np.ndarray, clip: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Lengths in the proportions of `shape` whose mean is `mean` after rounding and clipping, as nearly as may be."""
    low, high = 0.0, 100 * mean
    for _ in range(60):
        scale = (low + high) / 2
        lengths = clip(np.rint(scale * shape).astype(int))
        low, high = (scale, high) if lengths.mean() < mean else (low, scale)
    return lengths


# Output sigma of ShareGPT: the paper's own figures for Orca (Max) fix it. 7.00 requests fill 20.4 % of 15.7K slots, so
# a running one holds 458 tokens on average. A request runs as long as its output and is met with a probability in
# proportion: mean_prompt + E[output^2] / (2 E[output]) = 458, which gives sigma = 0.75.
SHAREGPT = Lengths("ShareGPT", 161.31, 337.99, sigma_prompt=1.2, sigma_output=0.75)
# Instructions of one or two sentences are alike in length, answers are not.
ALPACA = Lengths("Alpaca", 19.31, 58.45, sigma_prompt=0.5, sigma_output=0.85)
# Sentences of WMT16 English-German and their translations in LLaMA's tokens; the paper states no lengths.
TRANSLATION = Lengths("WMT16 en-de", 35, 45, sigma_prompt=0.5, sigma_output=0.5)
# Conversations: "the input prompts for most requests have 1024 tokens", and outputs have at most as many.
CHATBOT = Lengths("chatbot", 1024, 337.99, sigma_prompt=0.0, sigma_output=0.75)
