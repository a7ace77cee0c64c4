"""Beam search without a cache, in float64 and in the fewest lines: whole sequences are ranked anew in each step."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass
class Found:
    token_ids: list[int]  # the output's
    logprobs: list[float]
    score: float


def beam_search(
    logits_after: Callable[[list[int]], np.ndarray],
    prompt: list[int],
    width: int,
    max_tokens: int,
    *,
    stop_token_ids: Collection[int] = (),
    ends: Callable[[list[int]], bool] = lambda output: False,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
) -> tuple[list[Found], float]:
    """What is found, the best first, and the smallest gap between two probabilities or scores of which the order
    decided something. ends: whether an output ends by its text."""
    beams, kept, gap = [([], [])], [], np.inf
    while True:
        candidates = []
        for tokens, logprobs in beams:
            logits = np.asarray(logits_after([*prompt, *tokens]), np.float64)
            log_softmax = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            candidates += [([*tokens, i], [*logprobs, float(lp)]) for i, lp in enumerate(log_softmax)]
        candidates.sort(key=lambda candidate: -sum(candidate[1]))
        length, going_on, place = len(candidates[0][0]), [], 0
        is_last = length == max_tokens
        while place < len(candidates) and len(going_on) < width:
            tokens, logprobs = candidates[place]
            if tokens[-1] in stop_token_ids or is_last or ends(tokens):
                if place < width:
                    kept.append(Found(tokens, logprobs, sum(logprobs) / length**length_penalty))
                elif is_last:
                    break
            else:
                going_on.append(candidates[place])
            place += 1
        for cut in (place, width):  # who goes on, and who may be kept
            if 0 < cut < len(candidates):
                gap = min(gap, sum(candidates[cut - 1][1]) - sum(candidates[cut][1]))
        kept.sort(key=lambda found: -found.score)
        for better, worse in pairwise(kept[: width + 1]):  # a score's error is that of its sum, scaled as it is
            unit = max(len(found.token_ids) ** -length_penalty for found in (better, worse))
            gap = min(gap, (better.score - worse.score) / unit)
        del kept[width:]
        beams = going_on
        if not beams:
            return kept, gap
        if len(kept) == width:
            if early_stopping is True:
                return kept, gap
            end = max_tokens if early_stopping == "never" and length_penalty > 0 else length
            best = sum(beams[0][1]) / end**length_penalty
            unit = max(end**-length_penalty, len(kept[-1].token_ids) ** -length_penalty)
            gap = min(gap, abs(best - kept[-1].score) / unit)
            if best <= kept[-1].score:
                return kept, gap
