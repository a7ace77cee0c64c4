"""Runs a step on the backend: batch up, forward pass, sampling, token ids down."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cupaged.backends.base import SAMPLING_ROW, Backend
from cupaged.engine.batch import BatchBuilder
from cupaged.engine.scheduler import Schedule
from cupaged.engine.sequence import Request, Sequence
from cupaged.memory.arena import KVArena
from cupaged.sampling_params import MAX_LOGPROBS


@dataclass
class Logprobs:
    """Of each drawn token (column 0) and of the k most likely ones: what Backend.logprobs gives, on the host."""

    token_ids: np.ndarray  # [num_sampled, 1 + k] int32
    logprobs: np.ndarray  # [num_sampled, 1 + k] float32
    ranks: np.ndarray  # [num_sampled] int32, of column 0


@dataclass
class StepResult:
    sequences: list[Sequence]  # those that a token was drawn for
    token_ids: list[int]  # theirs; -1 where no logit was finite
    logprobs: Logprobs | None = None  # when one of them asks for any


class Runner:
    """decoder: models.decoder.Decoder, or whatever has its `forward(batch, arena)`.

    vocab_size: ids from here on are never drawn. max_num_seqs: the most sequences a step may hold.
    """

    def __init__(
        self, backend: Backend, decoder, arena: KVArena, *, vocab_size: int, max_num_seqs: int, max_model_len: int
    ):
        self.backend = backend
        self.decoder = decoder
        self.arena = arena
        self.vocab_size = vocab_size
        self._batches = BatchBuilder(
            max_num_seqs=max_num_seqs, max_model_len=max_model_len, block_size=arena.layout.block_size
        )
        self._host_rows = np.zeros(max_num_seqs, SAMPLING_ROW)  # by Sequence.row; counters are filled in each step
        self._row_owners: list[Sequence | None] = [None] * max_num_seqs

        max_columns = 1 + MAX_LOGPROBS
        self._rows = backend.empty((max_num_seqs,), SAMPLING_ROW)
        self._token_ids = backend.empty((max_num_seqs,), np.int32)
        self._top_ids = backend.empty((max_num_seqs * max_columns,), np.int32)
        self._top_logprobs = backend.empty((max_num_seqs * max_columns,), np.float32)
        self._ranks = backend.empty((max_num_seqs,), np.int32)

    def run(self, schedule: Schedule) -> StepResult:
        """Compute the scheduled tokens, and draw the next one where the last known one was among them."""
        sampled = schedule.sampled
        sequences = [schedule.sequences[i] for i in sampled]
        batch = self.backend.upload_batch(self._batches.build(schedule, sampled))
        logits = self.decoder.forward(batch, self.arena)
        if not sequences:
            return StepResult([], [])

        rows, token_ids = self._rows[: len(sequences)], self._token_ids[: len(sequences)]
        self.backend.copy_in(rows, self._sampling_rows(sequences))
        self.backend.sample(token_ids, logits, rows, self.vocab_size)
        asked = [p.logprobs for seq in sequences if (p := seq.request.params).logprobs is not None]
        logprobs = self._logprobs(logits, token_ids, max(asked)) if asked else None
        return StepResult(sequences, self.backend.to_host(token_ids).tolist(), logprobs)

    def _sampling_rows(self, sequences: list[Sequence]) -> np.ndarray:
        for seq in sequences:
            if self._row_owners[seq.row] is not seq:
                self._row_owners[seq.row] = seq
                self._host_rows[seq.row] = _sampling_row(seq.request)
        rows = self._host_rows[[seq.row for seq in sequences]]
        rows["counter"] = [seq.num_output_tokens for seq in sequences]
        return rows

    def _logprobs(self, logits, token_ids, k: int) -> Logprobs:
        num_rows, columns = len(token_ids), 1 + min(k, self.vocab_size)
        top_ids = self._top_ids[: num_rows * columns].reshape(num_rows, columns)
        top_logprobs = self._top_logprobs[: num_rows * columns].reshape(num_rows, columns)
        ranks = self._ranks[:num_rows]
        self.backend.logprobs(top_ids, top_logprobs, ranks, logits, token_ids, self.vocab_size)
        return Logprobs(*(self.backend.to_host(array) for array in (top_ids, top_logprobs, ranks)))


def _sampling_row(request: Request) -> tuple:
    params = request.params
    temperature = 0.0 if params.greedy else params.temperature
    return temperature, params.top_p, params.min_p, max(params.top_k, 0), request.seed, 0
