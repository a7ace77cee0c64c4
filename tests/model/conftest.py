"""Steps built by hand: what the engine would do, in the fewest lines and with the traps left open."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from cupaged.backends.reference import ReferenceBackend
from cupaged.engine.batch import Batch
from cupaged.memory.arena import KVArena, KVLayout
from cupaged.models.decoder import Decoder

NO_BLOCK = 1 << 30  # in the unused entries of block tables: whoever reads them fails


@dataclass
class Sequence:
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0


class Driver:
    """Runs a decoder over an arena of two slabs that starts as NaN, handing out its blocks in shuffled order."""

    def __init__(
        self, config, weights, backend, *, block_size=16, num_blocks=64, max_num_tokens=256, max_num_logits=256
    ):
        self.backend, self.block_size = backend, block_size
        layout = KVLayout(
            config.num_layers, config.num_kv_heads, block_size, config.head_dim, backend.dtype, num_blocks // 2
        )
        self.arena = KVArena(layout, backend, num_blocks)
        while self.arena.grow():
            backend.copy_in(self.arena.slabs[-1], np.full(layout.slab_shape, np.nan, backend.dtype))
        assert len(self.arena.slabs) == 2
        self.free = np.random.default_rng(0).permutation(num_blocks).tolist()
        max_model_len = num_blocks * block_size
        self.decoder = Decoder(
            config, weights, backend,
            max_num_tokens=max_num_tokens, max_num_logits=max_num_logits, max_model_len=max_model_len,
        )  # fmt: skip
        backend.reserve(config, max_num_tokens, max_num_logits, max_model_len)

    def new_sequence(self) -> Sequence:
        return Sequence()

    def step(self, *work: tuple[Sequence, list[int]], all_logits: bool = False, wanted: list[int] | None = None):
        """Append tokens to each sequence (one token is a decode: those come first) and run one step. Returns a list:
        for each sequence the logits [vocab_size] after its last token, or with all_logits [tokens, vocab_size].
        Given `wanted`, tokens of the step, returns their logits in one array."""
        tokens, positions, slots, starts, seq_lens, last = [], [], [], [0], [], []
        for sequence, new in work:
            first = sequence.num_computed
            sequence.num_computed += len(new)
            while len(sequence.blocks) * self.block_size < sequence.num_computed:
                sequence.blocks.append(self.free.pop())
            places = range(first, sequence.num_computed)
            tokens += new
            positions += places
            slots += [sequence.blocks[p // self.block_size] * self.block_size + p % self.block_size for p in places]
            starts.append(len(tokens))
            seq_lens.append(sequence.num_computed)
            last.append(len(tokens) - 1)
        tables = np.full((len(work), max(len(s.blocks) for s, _ in work) + 1), NO_BLOCK, np.int32)
        for row, (sequence, _) in zip(tables, work, strict=True):
            row[: len(sequence.blocks)] = sequence.blocks

        query_lens = [len(new) for _, new in work]
        num_decodes = next((i for i, length in enumerate(query_lens) if length > 1), len(work))
        assert 1 not in query_lens[num_decodes:], "decodes come first"
        rows = wanted if wanted is not None else range(len(tokens)) if all_logits else last
        arrays = (np.array(a, np.int32) for a in (tokens, positions, slots, starts, seq_lens, tables, rows))
        batch = Batch(*arrays, num_decodes, max(query_lens[num_decodes:], default=0), max(seq_lens))
        logits = self.backend.to_host(self.decoder.forward(self.backend.upload_batch(batch), self.arena))
        if wanted is not None:
            return logits
        return np.split(logits, starts[1:-1]) if all_logits else list(logits)

    def finish(self, sequence: Sequence) -> None:
        self.free = sequence.blocks + self.free
        sequence.blocks, sequence.num_computed = [], 0

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        return self.greedy_together([prompt], num_tokens)[0]

    def greedy_together(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """The prompts enter one a step, while those before them decode."""
        sequences = [Sequence() for _ in prompts]
        answers: list[list[int]] = [[] for _ in prompts]
        waiting = list(range(len(prompts)))
        while any(len(answer) < num_tokens for answer in answers):
            running = [i for i, answer in enumerate(answers) if 0 < len(answer) < num_tokens]
            work = [(i, answers[i][-1:]) for i in running]
            if waiting:
                i = waiting.pop(0)
                work.append((i, prompts[i]))
            for (i, _), logits in zip(work, self.step(*((sequences[i], new) for i, new in work)), strict=True):
                answers[i].append(int(logits.argmax()))
                if len(answers[i]) == num_tokens:
                    self.finish(sequences[i])
        return answers


@pytest.fixture(scope="session")
def backend():
    return ReferenceBackend()


@pytest.fixture(scope="session")
def new_driver(backend):
    """new_driver((config, weights), **sizes) -> Driver"""
    return lambda model, **sizes: Driver(*model, backend, **sizes)
