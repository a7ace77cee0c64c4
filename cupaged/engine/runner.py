"""Launches steps on the backend: batch up, forward pass, sampling, token ids down."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from cupaged.backends.base import Array, Backend
from cupaged.engine.batch import Batch, BatchBuilder
from cupaged.engine.beam_search import Choice
from cupaged.engine.prompt_logprobs import PromptScorer
from cupaged.engine.sampler import Draws, Logprobs, Sampler
from cupaged.engine.scheduler import Schedule
from cupaged.engine.sequence import FINISHED, Request, Sequence
from cupaged.engine.step_graphs import StepGraphs
from cupaged.memory.arena import KVArena


class LaunchedStep:
    """A step that the device computes, or has computed.

    rows: as Schedule.sampled, in the order of the draws. fetch: waits for these. prompt_logprobs: PromptScorer.score's.
    launch_time: when its launch began, on time.monotonic()'s clock.
    """

    def __init__(
        self,
        schedule: Schedule,
        rows: list[tuple[int, Sequence]],
        fetch: Callable[[], Draws],
        prompt_logprobs: list[tuple[Request, Logprobs]],
        launch_time: float,
    ):
        self.schedule = schedule
        self.launch_time = launch_time
        self.draws: Draws | None = None  # when it has been waited for
        self.choices: dict[Request, Choice] | None = None  # of its beam searches, when they are made
        self.prompt_logprobs = prompt_logprobs
        self._rows = rows
        self._fetch = fetch

    def wait(self) -> None:
        """Until it has finished; what was launched later may go on."""
        if self.draws is None:
            self.draws = self._fetch()

    @property
    def is_wanted(self) -> bool:
        """Whether anybody needs it: not all that it computes for have ended in the meantime."""
        return any(seq.state is not FINISHED for seq in self.schedule.sequences)

    def sampled(self) -> list[tuple[int, Sequence]]:
        """(row of the draws, for whom) of those that have not ended."""
        return [(row, seq) for row, (_, seq) in enumerate(self._rows) if seq.state is not FINISHED]


class _TakingDecoder:
    """A decoder that first takes the tokens which the step before has drawn. In a graph that costs the device two
    microseconds, and the host nothing."""

    def __init__(self, backend: Backend, decoder, drawn: Array):
        self._backend = backend
        self._decoder = decoder
        self._drawn = drawn

    def forward(self, batch: Batch, arena: KVArena) -> Array:
        if batch.num_decodes:
            self._backend.take_tokens(batch.token_ids[: batch.num_decodes], self._drawn)
        return self._decoder.forward(batch, arena)


class Runner:
    """decoder: models.decoder.Decoder, or whatever has its `forward(batch, arena)` and `compute_logits(indices)`.

    vocab_size: ids from here on are never drawn. max_num_tokens, max_num_seqs: the most that a step may hold; of the
    latter rows of logits, too. window: the model's, in tokens; None for none. enforce_eager: no graphs of steps, where
    the backend has them.
    """

    def __init__(
        self,
        backend: Backend,
        decoder,
        arena: KVArena,
        *,
        vocab_size: int,
        max_num_tokens: int,
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
        self._sampler = Sampler(backend, vocab_size=vocab_size, max_num_seqs=max_num_seqs)
        self._graphs: StepGraphs | None = None
        if backend.has_graphs and not enforce_eager:
            taking = _TakingDecoder(backend, decoder, self._sampler.token_ids)
            self._graphs = StepGraphs(
                backend,
                taking,
                arena,
                max_num_tokens=max_num_tokens,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
            )
        self._prompt_scorer = PromptScorer(backend, self._sampler, max_num_rows=max_num_seqs)

    def launch(self, schedule: Schedule, fill_in: Callable[[Batch], np.ndarray | None] | None = None) -> LaunchedStep:
        """Copy the blocks that are no longer shared, compute the scheduled tokens, and draw those that follow.

        A negative token id ~j among those of the decodes is the one that row j of the step launched before draws.
        fill_in: is called before anything is launched, to put into the batch what was not known when it was scheduled;
        returns (source, destination) of more blocks to copy, as Backend.copy_blocks wants them.
        """
        start = time.monotonic()
        late_copies = None
        if schedule.sequences:
            sampled = schedule.sampled
            if any([seq.logit_edits is not None for _, seq in sampled]):
                sampled = sorted(sampled, key=lambda pair: Sampler.sort_key(pair[1]))
            batch = self._batches.build(schedule, [i for i, _ in sampled])
            if self._graphs is not None and not PromptScorer.wants(schedule):
                batch = self._graphs.pad(batch)
            if fill_in is not None:
                late_copies = fill_in(batch)
        self._copy_blocks(self.arena, self.arena, schedule.copies)
        if late_copies is not None:
            self.backend.copy_blocks(self.arena, self.arena, late_copies)
        if not schedule.sequences:
            return LaunchedStep(schedule, [], lambda: ([], None), [], start)
        logits = self._forward(batch)[: len(sampled)]
        draws = self._sampler.draw(logits, [seq for _, seq in sampled])
        return LaunchedStep(schedule, sampled, draws, self._prompt_scorer.score(schedule, self.decoder), start)

    def _forward(self, host_batch: Batch) -> Array:
        """The logits, with those of padding after them."""
        batch = self.backend.upload_batch(host_batch)
        if self._graphs is not None:
            return self._graphs.forward(batch)
        return _TakingDecoder(self.backend, self.decoder, self._sampler.token_ids).forward(batch, self.arena)

    @property
    def num_graphs(self) -> int:
        """Shapes of steps that are captured."""
        return 0 if self._graphs is None else self._graphs.num_graphs

    def swap(self, dst: KVArena, src: KVArena, pairs: list[tuple[int, int]]) -> float:
        """Copy blocks of `src` to `dst`, one of which lies in the host's memory; returns the seconds that it took."""
        start = time.perf_counter()
        self._copy_blocks(dst, src, pairs)
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until everything that was launched has been computed."""
        self.backend.to_host(self._sampler.token_ids[:1])

    def forget_copies(self) -> None:
        """What steps have copied to the device may not have come there: the next ones copy it again."""
        self._sampler.forget_rows()

    def _copy_blocks(self, dst: KVArena, src: KVArena, pairs: list[tuple[int, int]]) -> None:
        if pairs:
            self.backend.copy_blocks(dst, src, np.array(pairs, np.int32))
