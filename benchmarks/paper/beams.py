"""Beam search by the engine, with random numbers in place of the model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cupaged.benchmark.workload import Workload
from cupaged.config import EngineConfig, ModelConfig
from cupaged.engine.engine import Engine
from cupaged.sampling_params import BeamSearchParams

from .simulation import BLOCK_SIZE, MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS
from .traces import MAX_LEN

# As small as may be: nothing is ever written into its cache.
MODEL = ModelConfig(
    architecture="StandIn",
    vocab_size=64,
    hidden_size=1,
    intermediate_size=1,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=1,
    max_position_embeddings=MAX_LEN + 1,
)
BYTES_PER_TOKEN = 2 * 4  # K and V in float32


@dataclass(frozen=True)
class StandInModel:
    """Next-token probabilities at random.

    For each beam, in each step: a first token has probability u, a second one u' of what is left, and so on. Each u is
    drawn from Beta(confidence, 1 - confidence), so that confidence is its mean and it is mostly near 0 or near 1.
    A confident model seldom changes the order of the beams, so that they live apart for long; an unsure one soon drops
    all but the offspring of one.
    """

    confidence: float

    def logprobs(self, rng: np.random.Generator, num_rows: int, num_tokens: int) -> np.ndarray:
        """[num_rows, num_tokens], the largest of each row first."""
        u = np.clip(rng.beta(self.confidence, 1 - self.confidence, (num_rows, num_tokens)), 1e-9, 1 - 1e-9)
        left = np.log1p(-u).cumsum(axis=1)
        logprobs = np.log(u)
        logprobs[:, 1:] += left[:, :-1]
        return -np.sort(-logprobs, axis=1)


class StandInBackend:
    """A backend whose log probabilities are a StandInModel's, and which computes nothing else. Its decoder as well."""

    name = "cpu"
    description = "stand-in"
    dtype = np.dtype(np.float32)
    has_graphs = False

    def __init__(self, model: StandInModel, seed: int):
        self._model = model
        self._rng = np.random.default_rng(seed)

    def forward(self, batch, arena) -> np.ndarray:
        return np.zeros((len(batch.logits_indices), MODEL.vocab_size), np.float32)

    def take_tokens(self, token_ids, drawn) -> None:
        """What comes out doesn't depend on what goes in."""

    def sample(self, token_ids, logits, rows, vocab_size) -> None:
        token_ids[:] = 0

    def logprobs(self, top_ids, top_logprobs, ranks, logits, token_ids, vocab_size) -> None:
        num_rows, columns = top_ids.shape
        top_ids[:] = np.arange(-1, columns - 1)
        top_ids[:, 0], top_logprobs[:, 0], ranks[:] = token_ids, 0.0, 1
        top_logprobs[:, 1:] = self._model.logprobs(self._rng, num_rows, columns - 1)

    def empty(self, shape, dtype) -> np.ndarray:
        return np.empty(shape, dtype)

    def copy_in(self, dst, src) -> None:
        dst[...] = src

    def copy_blocks(self, dst, src, pairs) -> None:
        pass

    def to_host(self, src) -> np.ndarray:
        return src.copy()

    def fetch(self, src):
        copied = src.copy()
        return lambda: copied

    def address(self, array) -> int:
        return array.ctypes.data

    def upload_batch(self, batch):
        return batch

    def memory_info(self) -> tuple[int, int]:
        return 1 << 30, 1 << 30

    def close(self) -> None:
        pass


def beam_sharing(workload: Workload, width: int, model: StandInModel) -> float:
    """The share of blocks that sharing saves, over all steps of all requests; with memory for all of them."""
    backend = StandInBackend(model, workload.seed)
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        kv_cache_memory_bytes=MAX_NUM_SEQS * MAX_LEN * BYTES_PER_TOKEN,
        enable_prefix_caching=False,
    )
    engine = Engine(config, MODEL, backend, backend)
    for i, (num_prompt, num_output) in enumerate(workload.sizes):
        params = BeamSearchParams(width, num_output, ignore_eos=True, detokenize=False)
        engine.add_request(str(i), [0] * num_prompt, params)
    while engine.has_unfinished_requests():
        engine.step()
    stats = engine.stats()
    assert stats.num_preemptions == 0
    assert stats.num_used_blocks == 0
    engine.close()
    return stats.mean_sharing
