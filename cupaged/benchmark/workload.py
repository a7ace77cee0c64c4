"""What is generated: requests of given sizes, their token ids random."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cupaged.arguments import is_finite_number, is_int, require

FIRST_ID = 10  # ids below are often special tokens


@dataclass(frozen=True)
class Workload:
    """sizes: of each request, (tokens in the prompt, tokens to generate). seed: decides the token ids and arrivals.
    n: outputs of each request.
    """

    sizes: tuple[tuple[int, int], ...]
    seed: int = 0
    n: int = 1

    @classmethod
    def uniform(cls, num_requests: int, prompt_len: int, output_len: int, seed: int = 0) -> Workload:
        return cls(((prompt_len, output_len),) * num_requests, seed)

    @classmethod
    def read(cls, path: str | Path) -> Workload:
        """From a JSON object {"seed": 0, "requests": [{"prompt_len": 155, "output_len": 84}, ...]}; other keys are left
        alone. Raises ValueError that names what is wrong."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path}: can't be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from None
        requests = content.get("requests") if isinstance(content, Mapping) else None
        if not isinstance(requests, list) or not requests:
            raise ValueError(f'{path}: must be {{"seed": ..., "requests": [...]}} with at least one request')
        sizes = []
        for i, request in enumerate(requests):
            size = [request.get(key) if isinstance(request, Mapping) else None for key in ("prompt_len", "output_len")]
            if not all(is_int(count) and count >= 1 for count in size):
                raise ValueError(
                    f"{path}: requests[{i}]: prompt_len and output_len must be integers >= 1; got {request!r}"
                )
            sizes.append((size[0], size[1]))
        seed = content.get("seed", 0)
        require(is_int(seed) and seed >= 0, f"{path}: seed", seed, "an integer >= 0")
        return cls(tuple(sizes), seed)

    def first(self, count: int) -> Workload:
        """Its first `count` requests, all if there are no more."""
        return replace(self, sizes=self.sizes[:count])

    @property
    def num_prompt_tokens(self) -> int:
        return sum(prompt_len for prompt_len, _ in self.sizes)

    @property
    def num_output_tokens(self) -> int:
        return self.n * sum(output_len for _, output_len in self.sizes)

    def prompts(self, vocab_size: int, turn: int = 0) -> list[list[int]]:
        """Token ids below vocab_size. Other turns have other ids, so that no cache of prompts helps a repetition."""
        return [
            np.random.default_rng([self.seed + turn, i]).integers(FIRST_ID, vocab_size, prompt_len).tolist()
            for i, (prompt_len, _) in enumerate(self.sizes)
        ]

    def arrivals(self, request_rate: float) -> list[float]:
        """Seconds after the start at which the requests come: a Poisson process of request_rate a second."""
        require(is_finite_number(request_rate) and request_rate > 0, "request_rate", request_rate, "a number above 0")
        gaps = np.random.default_rng(self.seed).exponential(1 / request_rate, len(self.sizes))
        return gaps.cumsum().tolist()
