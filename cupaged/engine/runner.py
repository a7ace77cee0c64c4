"""Runs a step on the backend: batch up, forward pass, sampling, token ids down."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from cupaged.backends.base import Array, Backend
from cupaged.engine.batch import Batch, BatchBuilder
from cupaged.engine.decode_graphs import DecodeGraphs
from cupaged.engine.prompt_logprobs import PromptScorer
from cupaged.engine.sampler import Logprobs, Sampler
from cupaged.engine.scheduler import Schedule
from cupaged.engine.sequence import Request, Sequence
from cupaged.memory.arena import KVArena

MIN_PAIRS = 1024  # block copies that one launch can do; many more are rare, and take several


@dataclass
class StepResult:
    sequences: list[Sequence]  # those that a token was drawn for, in any order
    token_ids: list[int]  # theirs; -1 where no logit was finite
    logprobs: Logprobs | None = None  # when one of them asks for any
    prompt_logprobs: list[tuple[Request, Logprobs]] = field(default_factory=list)  # PromptScorer.score's


class Runner:
    """decoder: models.decoder.Decoder, or whatever has its `forward(batch, arena)` and `compute_logits(indices)`.

    vocab_size: ids from here on are never drawn. max_num_seqs: the most sequences a step may hold, and rows of logits.
    window: the model's, in tokens; None for none. enforce_eager: no graphs of decode steps, where the backend has them.
    """

    def __init__(
        self,
        backend: Backend,
        decoder,
        arena: KVArena,
        *,
        vocab_size: int,
        max_num_seqs: int,
        max_model_len: int,
        window: int | None = None,
        enforce_eager: bool = False,
    ):
        self.backend = backend
        self.decoder = decoder
        self.arena = arena
        self.vocab_size = vocab_size
        self._batches = BatchBuilder(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_size=arena.layout.block_size,
            window=window,
        )
        self._pairs = backend.empty((max(max_num_seqs, MIN_PAIRS), 2), np.int32)
        self._graphs: DecodeGraphs | None = None
        if backend.has_graphs and not enforce_eager:
            self._graphs = DecodeGraphs(backend, decoder, arena, max_num_seqs=max_num_seqs, max_model_len=max_model_len)
        self._sampler = Sampler(backend, vocab_size=vocab_size, max_num_seqs=max_num_seqs)
        self._prompt_scorer = PromptScorer(backend, self._sampler, max_num_rows=max_num_seqs)

    def run(self, schedule: Schedule) -> StepResult:
        """Copy the blocks that are no longer shared, compute the scheduled tokens, and draw those that follow."""
        self._copy_blocks(self.arena, self.arena, schedule.copies)
        sampled = sorted(schedule.sampled, key=lambda pair: Sampler.sort_key(pair[1]))
        sequences = [seq for _, seq in sampled]
        logits = self._forward(self._batches.build(schedule, [i for i, _ in sampled]))[: len(sequences)]
        token_ids, logprobs = self._sampler.draw(logits, sequences) if sequences else ([], None)
        return StepResult(sequences, token_ids, logprobs, self._prompt_scorer.score(schedule, self.decoder))

    def _forward(self, batch: Batch) -> Array:
        """The logits, and perhaps more rows after them."""
        if self._graphs is None:
            return self.decoder.forward(self.backend.upload_batch(batch), self.arena)
        return self._graphs.forward(self.backend.upload_batch(self._graphs.pad(batch)))

    @property
    def num_graphs(self) -> int:
        """Decode steps that are captured."""
        return 0 if self._graphs is None else self._graphs.num_graphs

    def swap(self, dst: KVArena, src: KVArena, pairs: list[tuple[int, int]]) -> float:
        """Copy blocks of `src` to `dst`, one of which lies in the host's memory; returns the seconds that it took."""
        start = time.perf_counter()
        self._copy_blocks(dst, src, pairs)
        self.backend.to_host(self._pairs[:1])  # waits
        return time.perf_counter() - start

    def _copy_blocks(self, dst: KVArena, src: KVArena, pairs: list[tuple[int, int]]) -> None:
        for start in range(0, len(pairs), len(self._pairs)):
            part = np.array(pairs[start : start + len(self._pairs)], np.int32)
            on_device = self._pairs[: len(part)]
            self.backend.copy_in(on_device, part)
            self.backend.copy_blocks(dst, src, on_device)
