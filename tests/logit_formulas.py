"""What a request's parameters do to its logits, one token at a time: vLLM's order, in float64."""

from __future__ import annotations

import math
from collections import Counter

from cupaged.sampling_params import SamplingParams


def expected_logits(
    logits, prompt: list[int], output: list[int], params: SamplingParams, eos=(), bad_words=()
) -> list[float]:
    """bad_words: those of params as token sequences."""
    counts = Counter(output)
    for processor in params.logits_processors:
        logits = processor(output, logits)
    result = []
    for token, logit in enumerate(logits.tolist()):
        allowed = params.allowed_token_ids is None or token in params.allowed_token_ids
        completes_bad_word = any(
            token == word[-1] and len(output) >= len(word) - 1 and output[len(output) - len(word) + 1 :] == word[:-1]
            for word in bad_words
        )
        too_early = len(output) < params.min_tokens and (token in eos or token in params.stop_token_ids)
        if not allowed or completes_bad_word or too_early:
            result.append(-math.inf)
            continue
        value = logit + (params.logit_bias or {}).get(token, 0.0)
        if token in prompt or token in counts:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * counts[token]
        value -= params.presence_penalty * (counts[token] > 0)
        result.append(value)
    return result
