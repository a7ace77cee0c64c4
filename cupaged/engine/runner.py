"""Runs a step on the backend: batch up, forward pass, sampling, token ids down."""

from __future__ import annotations

from dataclasses import dataclass

from cupaged.backends.base import Backend
from cupaged.engine.batch import BatchBuilder
from cupaged.engine.sampler import Logprobs, Sampler
from cupaged.engine.scheduler import Schedule
from cupaged.engine.sequence import Sequence
from cupaged.memory.arena import KVArena


@dataclass
class StepResult:
    sequences: list[Sequence]  # those that a token was drawn for, in any order
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
        self._sampler = Sampler(backend, vocab_size=vocab_size, max_num_seqs=max_num_seqs)

    def run(self, schedule: Schedule) -> StepResult:
        """Compute the scheduled tokens, and draw the next one where the last known one was among them."""
        sampled = sorted(schedule.sampled, key=lambda i: Sampler.sort_key(schedule.sequences[i]))
        sequences = [schedule.sequences[i] for i in sampled]
        batch = self.backend.upload_batch(self._batches.build(schedule, sampled))
        logits = self.decoder.forward(batch, self.arena)
        if not sequences:
            return StepResult([], [])
        return StepResult(sequences, *self._sampler.draw(logits, sequences))
