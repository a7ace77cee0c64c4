"""Decode steps as graphs: one launch a step instead of hundreds.

    n sequences, the longest of l tokens  --pad-->  one of few shapes  --forward-->  the graph of that shape

A step of a shape that is new runs as it would without graphs, and what it launches is recorded beside it; every later
step of that shape is one launch of the record. All that differs between steps of one shape comes through device memory:
the batch's arrays, which lie in the same place each time, and the arena's table of slabs, so the cache may grow and
shrink. Padded sequences have no tokens: they write to no slot and attend to nothing.

A padded step gives the bits of the step that it pads: rows of the forward pass don't depend on each other, keys are
split at positions of the sequence's own, and no size in BATCH_SIZES is across an edge between two matrix kernels.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable

import numpy as np

from cupaged.backends.base import Array, Backend
from cupaged.engine.batch import Batch
from cupaged.engine.block_pool import NULL_BLOCK
from cupaged.memory.arena import KVArena

BATCH_SIZES = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))  # vLLM's; steps of more sequences are not captured
MIN_LENGTH = 256  # tokens; from here on lengths are powers of two. Shorter block tables would save next to nothing.

logger = logging.getLogger(__name__)


class DecodeGraphs:
    """Runs a decoder's steps over `arena`, those that only decode as graphs.

    decoder: models.decoder.Decoder, or whatever has its `forward(batch, arena)`. backend: one that has graphs.
    max_num_seqs, max_model_len: the limits of a step, and so of what it is padded to.
    """

    def __init__(self, backend: Backend, decoder, arena: KVArena, *, max_num_seqs: int, max_model_len: int):
        self.max_model_len = max_model_len
        self._backend = backend
        self._decoder = decoder
        self._arena = arena
        largest = min(max_num_seqs, BATCH_SIZES[-1])
        self._sizes = [*(size for size in BATCH_SIZES if size < largest), largest]
        # What launches all of a step at once, and the logits that it leaves, by what the launches were recorded with.
        self._graphs: dict[tuple, tuple[Callable[[], None], Array]] = {}
        self._can_capture = True

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def pad(self, batch: Batch) -> Batch:
        """A batch (of host arrays) that only decodes, in the next larger shape; any other as it is.

        The sequences and logits come first. Those after them are padding.
        """
        if not self._takes(batch):
            return batch
        n, size = batch.num_seqs, self._sizes[bisect_left(self._sizes, batch.num_seqs)]
        max_seq_len = min(max(MIN_LENGTH, 1 << (batch.max_seq_len - 1).bit_length()), self.max_model_len)
        num_blocks, max_blocks = batch.block_tables.shape[1], -(-max_seq_len // self._arena.layout.block_size)
        block_tables = np.full((size, max_blocks), NULL_BLOCK, np.int32)
        block_tables[:n, :num_blocks] = batch.block_tables
        starts = np.arange(size + 1, dtype=np.int32)
        token_ids, positions, slot_mapping, seq_lens, logits_indices = padded = np.zeros((5, size), np.int32)
        slot_mapping[n:] = -1
        logits_indices[n:] = starts[n:size]
        arrays = (batch.token_ids, batch.positions, batch.slot_mapping, batch.seq_lens, batch.logits_indices)
        for array, values in zip(padded, arrays, strict=True):
            array[:n] = values
        return Batch(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slot_mapping,
            query_start_loc=starts,
            seq_lens=seq_lens,
            block_tables=block_tables,
            logits_indices=logits_indices,
            num_decodes=size,
            max_query_len=0,
            max_seq_len=max_seq_len,
        )

    def forward(self, batch: Batch) -> Array:
        """As Decoder.forward, for the uploaded batch; with a row of logits for each sequence of the padding as well."""
        if not self._takes(batch):
            return self._decoder.forward(batch, self._arena)
        key = self._key(batch)
        if (graph := self._graphs.get(key)) is not None:
            launch, logits = graph
            launch()
            return logits
        logits = self._decoder.forward(batch, self._arena)  # sets up what launches need, which a capture can't
        if self._can_capture:
            self._capture(key, batch)
        return logits

    def _takes(self, batch: Batch) -> bool:
        """Whether each sequence has one token, of which it wants the logits, and they are not too many."""
        return batch.num_decodes == batch.num_seqs == batch.logits_indices.shape[0] <= self._sizes[-1]

    def _key(self, batch: Batch) -> tuple:
        """All that launches are given and that may differ between two batches that `_takes` accepts."""
        arrays = [value for value in vars(batch).values() if not isinstance(value, int)]
        return batch.max_seq_len, *((self._backend.address(array), array.shape) for array in arrays)

    def _capture(self, key: tuple, batch: Batch) -> None:
        logits: list[Array] = []
        try:
            launch = self._backend.capture(lambda: logits.append(self._decoder.forward(batch, self._arena)))
        except (RuntimeError, MemoryError) as error:  # CuPy's errors are such
            self._can_capture = False
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            logger.warning("decode steps run without further CUDA graphs, as one can't be captured: %s", reason)
            return
        self._graphs[key] = launch, logits[0]
