"""How long a step takes: a model, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepTime:
    """seconds = fixed + sequences * per_sequence + max(weights, tokens * per_token) + cached tokens * per_cached_token

    A step reads all weights once, or computes long enough on its tokens to hide that; then each sequence's attention
    reads its keys and values. The host's work and the launches take their time besides, in part for each sequence.
    """

    fixed: float
    per_sequence: float
    weights: float
    per_token: float
    per_cached_token: float

    def __call__(self, num_sequences: int, num_tokens: int, num_cached_tokens: int) -> float:
        host = self.fixed + num_sequences * self.per_sequence
        return host + max(self.weights, num_tokens * self.per_token) + num_cached_tokens * self.per_cached_token


NUM_PARAMETERS = 13e9
KV_BYTES_PER_TOKEN = 40 * 2 * 5120 * 2  # layers, K and V, hidden size, float16: 800 KiB
BYTES_PER_S = 0.8 * 1.555e12  # an A100-40GB's memory at 80 %
FLOPS = 0.5 * 312e12  # its tensor cores at 50 %

# For what doesn't depend on times: each step counts alike.
UNIT = StepTime(fixed=1.0, per_sequence=0.0, weights=0.0, per_token=0.0, per_cached_token=0.0)
# OPT-13B, or LLaMA-13B, on one A100-40GB. What the device does is the roofline above. The host's two terms are
# calibrated: with them paging has as many requests in its batch as in the paper's figure 13, 30.42 at 2 requests/s of
# ShareGPT and 132.44 at 30 requests/s of Alpaca. (The paper's engine was PyTorch with a scheduler and a sampler in
# Python.)
A100_13B = StepTime(
    fixed=0.005,
    per_sequence=0.00027,
    weights=2 * NUM_PARAMETERS / BYTES_PER_S,
    per_token=2 * NUM_PARAMETERS / FLOPS,
    per_cached_token=KV_BYTES_PER_TOKEN / BYTES_PER_S,
)
