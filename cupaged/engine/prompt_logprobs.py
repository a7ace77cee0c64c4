"""Log probabilities of the prompts' own tokens, for the requests that ask for them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from cupaged.backends.base import Backend
from cupaged.engine.sampler import Logprobs, Sampler
from cupaged.engine.scheduler import Schedule
from cupaged.engine.sequence import Request


class PromptScorer:
    """Takes the logits of prompts a group of tokens at a time, since those of a whole chunk may need gigabytes.

    max_num_rows: the tokens of a group; what decoder and sampler allow.
    """

    def __init__(self, backend: Backend, sampler: Sampler, *, max_num_rows: int):
        self._backend = backend
        self._sampler = sampler
        self._indices = backend.empty((max_num_rows,), np.int32)
        self._token_ids = backend.empty((max_num_rows,), np.int32)

    @staticmethod
    def wants(schedule: Schedule) -> bool:
        """Whether `score` will look for tokens of prompts at the places that `schedule` gives them."""
        return any([seq.request.prompt_logprobs is not None for seq in schedule.sequences[schedule.num_decodes :]])

    def score(self, schedule: Schedule, decoder) -> list[tuple[Request, Logprobs]]:
        """For each request of which `schedule` computes something that it wants: log probabilities of its prompt's
        tokens, from token len(request.prompt_logprobs) on.

        decoder: has run just this, so that its `compute_logits` knows the step's tokens. The schedule's sequences have
        not moved on yet.
        """
        requests, indices, token_ids, ends = [], [], [], [0]
        first_index = 0  # of a sequence's tokens, in the step
        for seq, num_tokens in zip(schedule.sequences, schedule.num_tokens, strict=True):
            request = seq.request
            if request.prompt_logprobs is not None:
                # A token's logits tell of the token after it, so the prompt's last one has no part in this.
                start = max(seq.num_cached_tokens, len(request.prompt_logprobs) - 1)
                end = min(seq.num_cached_tokens + num_tokens, seq.num_prompt_tokens - 1)
                if start < end:
                    requests.append(request)
                    shift = first_index - seq.num_cached_tokens
                    indices += range(start + shift, end + shift)
                    token_ids += seq.token_ids[start + 1 : end + 1]
                    ends.append(len(indices))
            first_index += num_tokens
        if not requests:
            return []

        k, step = max(request.params.prompt_logprobs for request in requests), len(self._indices)
        groups = [
            self._score(indices[start : start + step], token_ids[start : start + step], k, decoder)
            for start in range(0, len(indices), step)
        ]
        whole = Logprobs(*(np.concatenate(arrays) for arrays in zip(*(vars(g).values() for g in groups), strict=True)))
        return [
            (request, Logprobs(whole.token_ids[a:b], whole.logprobs[a:b], whole.ranks[a:b]))
            for request, (a, b) in zip(requests, pairwise(ends), strict=True)
        ]

    def _score(self, indices: list[int], token_ids: list[int], k: int, decoder) -> Logprobs:
        """Of token_ids, each as the one that follows the step's token indices[i]."""
        rows = self._indices[: len(indices)]
        self._backend.copy_in(rows, np.array(indices, np.int32))
        next_ids = self._token_ids[: len(indices)]
        self._backend.copy_in(next_ids, np.array(token_ids, np.int32))
        return self._sampler.logprobs(decoder.compute_logits(rows), next_ids, k)()
