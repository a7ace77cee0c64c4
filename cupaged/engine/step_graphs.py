"""Steps as graphs: one launch a step instead of hundreds.

    n sequences, the longest of l tokens  --pad-->  one of few shapes  --forward-->  the graph of that shape

A step of a shape that is new runs as it would without graphs, and what it launches is recorded beside it; every later
step of that shape is one launch of the record. All that differs between steps of one shape comes through device memory:
the batch's arrays, which lie in the same place each time, and the arena's table of slabs, so the cache may grow and
shrink. Padded sequences have no tokens: they write to no slot and attend to nothing.

Steps that only decode come in few shapes, and are recorded at once. Of those with prompts in them only small ones are
padded, where launches take the host as long as the device works; there are many more shapes of these, so one is
recorded when it comes a second time. Graphs that were not used for the longest are forgotten.

A padded step gives the bits of the step that it pads: rows of the forward pass don't depend on each other, keys are
split at positions of the sequence's own, and no size in BATCH_SIZES or STEP_SIZES is across an edge between two matrix
kernels.
"""

from __future__ import annotations

import functools
import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from cupaged.backends.base import Array, Backend
from cupaged.engine.batch import Batch
from cupaged.engine.block_pool import NULL_BLOCK
from cupaged.memory.arena import KVArena

BATCH_SIZES = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))  # vLLM's; steps of more sequences are not captured
STEP_SIZES = (16, *range(64, 513, 64))  # tokens of a step with prompts; those with more keep the device busy
MAX_PROMPTS = 16  # in such a step
MIN_LENGTH = 256  # tokens; from here on lengths are powers of two. Shorter block tables would save next to nothing.
MAX_GRAPHS = 256  # and as many shapes that have come once; a graph takes the device some hundred KB

logger = logging.getLogger(__name__)


class StepGraphs:
    """Runs a decoder's steps over `arena`, those that only decode and other small ones as graphs.

    decoder: models.decoder.Decoder, or whatever has its `forward(batch, arena)`. backend: one that has graphs.
    max_num_tokens, max_num_seqs, max_model_len: the limits of a step, and so of what it is padded to.
    """

    def __init__(
        self,
        backend: Backend,
        decoder,
        arena: KVArena,
        *,
        max_num_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
    ):
        self._backend = backend
        self._decoder = decoder
        self._arena = arena
        largest = min(max_num_seqs, BATCH_SIZES[-1])
        find = functools.partial(
            _find_padded_shape,
            batch_sizes=[*(size for size in BATCH_SIZES if size < largest), largest],
            step_sizes=[0, *(size for size in STEP_SIZES if size <= max_num_tokens)],
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
        )
        self._padded_shape = functools.lru_cache(maxsize=4096)(find)
        # What launches all of a step at once, and the logits that it leaves, by what the launches were recorded with.
        # The last ones used stand last.
        self._graphs: dict[tuple, tuple[Callable[[], None], Array]] = {}
        self._met_once: dict[tuple, None] = {}  # of steps with prompts, in order
        self._can_capture = True

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def pad(self, batch: Batch) -> Batch:
        """A batch (of host arrays) in the next larger one of few shapes; any other as it is.

        The sequences that decode come first, and then their padding; so do the others. The logits come first of all.
        """
        shape = self._padded_shape(_shape_of(batch))
        return batch if shape is None else _padded(batch, shape, self._arena.layout.block_size)

    def forward(self, batch: Batch) -> Array:
        """As Decoder.forward, for the uploaded batch; with a row of logits for each that `pad` has added as well."""
        shape = _shape_of(batch)
        if shape != self._padded_shape(shape):
            return self._decoder.forward(batch, self._arena)
        # All that launches are given and that may differ. Shapes and the first array's place say where the others lie.
        key = *shape, batch.block_tables.shape[1], self._backend.address(batch.token_ids)
        graph = self._graphs.pop(key, None)
        if graph is None and key in self._met_once:
            del self._met_once[key]
            graph = self._capture(batch)
        if graph is not None:
            _put_last(self._graphs, key, graph)
            launch, logits = graph
            launch()
            return logits
        logits = self._decoder.forward(batch, self._arena)  # sets up what launches need, which a capture can't
        if batch.num_decodes < batch.num_seqs:
            _put_last(self._met_once, key, None)
        elif (graph := self._capture(batch)) is not None:
            _put_last(self._graphs, key, graph)
        return logits

    def _capture(self, batch: Batch) -> tuple[Callable[[], None], Array] | None:
        if not self._can_capture:
            return None
        logits: list[Array] = []
        try:
            launch = self._backend.capture(lambda: logits.append(self._decoder.forward(batch, self._arena)))
        except (RuntimeError, MemoryError) as error:  # CuPy's errors are such
            self._can_capture = False
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            logger.warning("steps run without further CUDA graphs, as one can't be captured: %s", reason)
            return None
        return launch, logits[0]


def _put_last(shapes: dict, key: tuple, value) -> None:
    """As the last of MAX_GRAPHS at most; the first one goes."""
    shapes[key] = value
    if len(shapes) > MAX_GRAPHS:
        del shapes[next(iter(shapes))]


class _Shape(NamedTuple):
    """What the launches of a batch depend on, beside places in memory."""

    num_tokens: int
    num_decodes: int
    num_seqs: int
    num_logits: int
    max_query_len: int
    max_seq_len: int


def _shape_of(batch: Batch) -> _Shape:
    return _Shape(
        batch.num_tokens,
        batch.num_decodes,
        batch.num_seqs,
        batch.logits_indices.shape[0],
        batch.max_query_len,
        batch.max_seq_len,
    )


def _find_padded_shape(
    shape: _Shape, *, batch_sizes: Sequence[int], step_sizes: Sequence[int], max_num_seqs: int, max_model_len: int
) -> _Shape | None:
    """What to pad a batch of this shape to; None where it is to stay as it is."""
    num_prompts = shape.num_seqs - shape.num_decodes
    if max(shape.num_decodes, shape.num_logits) > batch_sizes[-1] or num_prompts > MAX_PROMPTS:
        return None
    num_decodes = num_tokens = _next(batch_sizes, shape.num_decodes)
    if num_prompts:
        if shape.num_tokens > step_sizes[-1]:
            return None
        num_tokens = _next(step_sizes, shape.num_tokens)
        num_prompts = _next_power(num_prompts)
        num_query_tokens = shape.num_tokens - shape.num_decodes
        if num_decodes + num_query_tokens > num_tokens or num_decodes + num_prompts > max_num_seqs:
            num_decodes, num_prompts = shape.num_decodes, shape.num_seqs - shape.num_decodes
    return _Shape(
        num_tokens=num_tokens,
        num_decodes=num_decodes,
        num_seqs=num_decodes + num_prompts,
        num_logits=_next(batch_sizes, shape.num_logits),
        max_query_len=min(_next_power(shape.max_query_len), num_tokens),
        max_seq_len=min(max(MIN_LENGTH, _next_power(shape.max_seq_len)), max_model_len),
    )


def _padded(batch: Batch, shape: _Shape, block_size: int) -> Batch:
    """`batch` with padding after the sequences that decode, whose tokens are as many, and at the end."""
    n, extra = batch.num_decodes, shape.num_decodes - batch.num_decodes

    def spread(values: Array, size: int, padding: int) -> Array:
        if len(values) == size:
            return values
        array = np.full((size, *values.shape[1:]), padding, np.int32)
        array[:n] = values[:n]
        array[n + extra : len(values) + extra] = values[n:]
        return array

    query_start_loc = batch.query_start_loc
    if shape.num_seqs > batch.num_seqs:
        query_start_loc = np.full(shape.num_seqs + 1, batch.num_tokens + extra, np.int32)
        query_start_loc[: shape.num_decodes] = np.arange(shape.num_decodes)
        query_start_loc[shape.num_decodes : batch.num_seqs + extra + 1] = batch.query_start_loc[n:] + np.int32(extra)
    block_tables = np.full((shape.num_seqs, -(-shape.max_seq_len // block_size)), NULL_BLOCK, np.int32)
    block_tables[:, : batch.block_tables.shape[1]] = spread(batch.block_tables, shape.num_seqs, NULL_BLOCK)
    indices = batch.logits_indices
    if extra and n < batch.num_tokens:
        indices = indices + np.int32(extra) * (indices >= n)
    if shape.num_logits > len(indices):
        indices = np.append(indices, np.zeros(shape.num_logits - len(indices), np.int32))
    return Batch(
        token_ids=spread(batch.token_ids, shape.num_tokens, 0),
        positions=spread(batch.positions, shape.num_tokens, 0),
        slot_mapping=spread(batch.slot_mapping, shape.num_tokens, -1),
        query_start_loc=query_start_loc,
        seq_lens=spread(batch.seq_lens, shape.num_seqs, 0),
        block_tables=block_tables,
        logits_indices=indices,
        num_decodes=shape.num_decodes,
        max_query_len=shape.max_query_len,
        max_seq_len=shape.max_seq_len,
    )


def _next(sizes: Sequence[int], size: int) -> int:
    """The smallest of `sizes` (in order) that isn't below `size`; 0 for 0."""
    return sizes[bisect_left(sizes, size)] if size else 0


def _next_power(number: int) -> int:
    """The next power of two that isn't below it; 0 for 0."""
    return 1 << (number - 1).bit_length() if number else 0
