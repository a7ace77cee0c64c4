"""Beam search: which continuations of a request's beams live on, which are kept, and when the search is over."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Collection
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import NamedTuple

from cupaged.engine.output_text import OutputText
from cupaged.engine.sequence import Request, Sequence
from cupaged.sampling_params import BeamSearchParams


class Continuation(NamedTuple):
    """A beam and a token after it."""

    beam: Sequence
    token_id: int
    cumulative_logprob: float  # of the beam's output and this token
    row: int  # where its log probability stands in the arrays that were chosen from
    column: int
    text: OutputText | None = None  # the output's, when there are stop strings
    finish_reason: str | None = None  # None: it can go on
    stop_reason: int | str | None = None


@dataclass
class Choice:
    """How a search goes on from one step: what BeamSearch.choose and place make of it.

    token_ids, logprobs: what was chosen from, for each beam. is_launched: the beams' next tokens are computed already.
    """

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    survivors: list[Continuation]
    finished: list[Continuation]
    placed: list[tuple[Sequence, Continuation]]
    is_launched: bool = False

    @property
    def forks(self) -> list[tuple[Sequence, Sequence]]:
        """(parent, child): the second goes on from where the first one stands."""
        return [(candidate.beam, seq) for seq, candidate in self.placed if candidate.beam is not seq]


class Hypothesis(NamedTuple):
    score: float
    sequence: Sequence


class BeamSearch:
    """The search of one request, in transformers' semantics.

    All beams have the same length. In each step the continuations of all beams are ranked together by their
    cumulative log probability. The best `beam_width` that can go on become the new beams. Those among the best
    `beam_width` that end here are kept, with score = cumulative_logprob / output length ** length_penalty (the
    token that ended it counts), and of all that were ever kept the `beam_width` with the best scores stay.

    stop_token_ids: those that end a hypothesis, EOS included. max_num_tokens: the longest output.
    """

    def __init__(
        self, params: BeamSearchParams, *, eos_token_ids: Collection[int], vocab_size: int, max_num_tokens: int
    ):
        self.beam_width = params.beam_width
        self.kept: list[Hypothesis] = []  # the best first
        # As far as its tokens go, all agree that may still become the best output.
        self.settled: Sequence | None = None
        self._eos_token_ids = frozenset(() if params.ignore_eos else eos_token_ids)
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self._length_penalty = params.length_penalty
        self._early_stopping = params.early_stopping
        self._max_num_tokens = max_num_tokens
        self._all_stop_token_ids = self._eos_token_ids | self._stop_token_ids
        # Of one beam's continuations so many may be needed: beam_width that go on, or that end with a stop string,
        # behind those that end with a stop token.
        wanted = params.beam_width * (2 if params.stop else 1) + len(self._all_stop_token_ids)
        self.num_candidates = min(max(wanted, params.logprobs or 0), vocab_size)

    def choose(
        self, beams: list[Sequence], token_ids: list[list[int]], logprobs: list[list[float]]
    ) -> tuple[list[Continuation], list[Continuation]]:
        """The continuations to go on with, and those that end here and may be kept, both the likeliest first.

        token_ids, logprobs: for each beam its most likely next tokens, in order; the first num_candidates count. Of
        equally likely continuations those of earlier beams come first.
        """
        sums = [beam.cumulative_logprob for beam in beams]
        heap = [(-(sums[row] + logprobs[row][0]), row, 0) for row in range(len(beams))]  # each beam's next best
        heapify(heap)
        survivors: list[Continuation] = []
        finished: list[Continuation] = []
        # What may end by more than its last token is looked at one by one.
        may_end = beams[0].output_text is not None or beams[0].num_output_tokens + 1 == self._max_num_tokens
        place = 0
        while heap and len(survivors) < self.beam_width:
            cost, row, column = heap[0]
            if cost == math.inf:
                break
            if column + 1 < self.num_candidates:
                heapreplace(heap, (-(sums[row] + logprobs[row][column + 1]), row, column + 1))
            else:
                heappop(heap)
            token_id = token_ids[row][column]
            candidate = Continuation(beams[row], token_id, -cost, row, column)
            if may_end or token_id in self._all_stop_token_ids:
                candidate = self._judge(candidate)
            if candidate.finish_reason is None:
                survivors.append(candidate)
            elif place < self.beam_width:
                finished.append(candidate)
            place += 1
        return survivors, finished

    def _judge(self, candidate: Continuation) -> Continuation:
        """With what there is to say about its end."""
        beam, token_id, text = candidate.beam, candidate.token_id, None
        if token_id in self._eos_token_ids:
            return candidate._replace(finish_reason="stop")
        if token_id in self._stop_token_ids:
            return candidate._replace(finish_reason="stop", stop_reason=token_id)
        if beam.output_text is not None:
            text = beam.output_text.copy()
            found = text.push(token_id)
            if found is not None:
                return candidate._replace(finish_reason="stop", stop_reason=found)
        if beam.num_output_tokens + 1 == self._max_num_tokens:
            return candidate._replace(finish_reason="length")
        return candidate if text is None else candidate._replace(text=text)

    def ends_with_stop_token(self, seq: Sequence) -> bool:
        last = seq.token_ids[-1]
        return seq.num_output_tokens > 0 and (last in self._eos_token_ids or last in self._stop_token_ids)

    # -- what is kept --------------------------------------------------------------------------------------

    def score(self, cumulative_logprob: float, num_tokens: int) -> float:
        return cumulative_logprob / num_tokens**self._length_penalty

    @property
    def is_full(self) -> bool:
        return len(self.kept) == self.beam_width

    def wants(self, candidate: Continuation) -> bool:
        """Whether it would be kept."""
        score = self.score(candidate.cumulative_logprob, candidate.beam.num_output_tokens + 1)
        return not self.is_full or score > self.kept[-1].score

    def keep(self, sequence: Sequence) -> None:
        score = self.score(sequence.cumulative_logprob, sequence.num_output_tokens)
        insort(self.kept, Hypothesis(score, sequence), key=lambda hypothesis: -hypothesis.score)
        del self.kept[self.beam_width :]

    def is_over(self, best_logprob: float, num_tokens: int) -> bool:
        """Whether what is kept is the result, though there are beams, of `num_tokens` tokens of output and
        best_logprob at best.

        With early_stopping True it is when beam_width hypotheses are kept. Otherwise when no beam could get a better
        score than the worst of them, by its present length; "never" counts in that longer ones may score better.
        """
        if not self.is_full:
            return False
        if self._early_stopping is True:
            return True
        if self._early_stopping == "never" and self._length_penalty > 0:
            num_tokens = self._max_num_tokens
        return self.score(best_logprob, num_tokens) <= self.kept[-1].score

    # -- the beams -----------------------------------------------------------------------------------------

    def place(self, request: Request, survivors: list[Continuation]) -> list[tuple[Sequence, Continuation]]:
        """Which of the request's sequences becomes which of the survivors.

        A beam that goes on stays where it is, with the best of its continuations; the others take the places of
        beams that don't. If there are fewer survivors than sequences, the rest double the first one, with a
        probability of 0, so that nothing is ever chosen from them.
        """
        if not survivors:
            return []
        missing = self.beam_width - len(survivors)
        survivors = survivors + [survivors[0]._replace(cumulative_logprob=-math.inf)] * missing
        going_on = {candidate.beam for candidate in survivors}
        free = [seq for seq in request.sequences if seq not in going_on]
        placed = []
        for candidate in survivors:
            if candidate.beam in going_on:
                going_on.remove(candidate.beam)
                placed.append((candidate.beam, candidate))
            else:
                placed.append((free.pop(), candidate))
        return placed

    def settle(self, beams: list[Sequence]) -> bool:
        """Bring `settled` up to date; returns whether it grew.

        Which beam will be the best is open, and so is whether it will beat the best one kept.
        """
        settled, others = self.settled, [beam.token_ids for beam in beams if beam.cumulative_logprob > -math.inf]
        if self.kept:
            others.append(self.kept[0].sequence.token_ids)
        first = beams[0]
        start = end = len(settled.token_ids)
        shortest = min(len(others[0]), len(others[-1]))  # all beams are as long
        while end < shortest and all([other[end] == first.token_ids[end] for other in others]):
            end += 1
        for i in range(start, end):
            settled.token_ids.append(first.token_ids[i])
            if settled.logprobs is not None:
                entries = first.logprobs[i - settled.num_prompt_tokens]
                settled.logprobs.append(entries)
                settled.cumulative_logprob += entries[first.token_ids[i]].logprob
        return end > start
