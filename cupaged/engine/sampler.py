"""From logits to tokens: each row edited and drawn from as its request wants it, and log probabilities."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cupaged.backends.base import LOGIT_EDIT, MAX_TOP_TOKENS, SAMPLING_ROW, Array, Backend
from cupaged.engine.logit_edits import EditsOfRows
from cupaged.engine.sequence import Sequence

# Of the copies of logits that are edited while the raw ones are kept: so many bytes at a time.
COPY_BYTES = 16 << 20


@dataclass
class Logprobs:
    """Of each drawn token (column 0) and of the k most likely ones: what Backend.logprobs gives, on the host."""

    token_ids: np.ndarray  # [num_sampled, 1 + k] int32
    logprobs: np.ndarray  # [num_sampled, 1 + k] float32
    ranks: np.ndarray  # [num_sampled] int32, of column 0


Draws = tuple[list[int], Logprobs | None]  # of a step: token ids, -1 where no logit was finite


class Sampler:
    """vocab_size: ids from here on are never drawn. max_num_seqs: the most rows a step may have.

    token_ids [max_num_seqs] int32, on the device: the last step's draws, in their order.
    """

    def __init__(self, backend: Backend, *, vocab_size: int, max_num_seqs: int):
        self.vocab_size = vocab_size
        self._backend = backend
        self._max_num_seqs = max_num_seqs
        self._host_rows = np.zeros(max_num_seqs, SAMPLING_ROW)  # by Sequence.row; counters are filled in each step
        self._row_owners: list[Sequence | None] = [None] * max_num_seqs
        self._uploaded_rows: bytes | None = None  # what self._rows begins with, if all of them are greedy
        self._uploaded_for: list[Sequence] = []  # whose rows these are

        max_columns = 1 + MAX_TOP_TOKENS
        self._rows = backend.empty((max_num_seqs,), SAMPLING_ROW)
        self.token_ids = backend.empty((max_num_seqs,), np.int32)
        # Of log probabilities: token ids, values, and ranks, one after the other, so that one copy fetches them.
        self._found = backend.empty((max_num_seqs * (2 * max_columns + 1),), np.int32)

        # What few requests need is taken when one does.
        self._edits_of_rows = EditsOfRows()
        self._edits = _Upload(backend, LOGIT_EDIT)
        self._masks = _Upload(backend, np.uint32)
        self._mask_rows = _Upload(backend, np.int32)
        self._copies: Array | None = None

    def draw(self, logits: Array, sequences: list[Sequence]) -> Callable[[], Draws]:
        """Draw a token for each sequence from its row of logits, which change; -1 where none is finite, or where one of
        its logits_processors fails, which seq.error then tells. And compute log probabilities, of the raw logits, when
        one of the sequences asks for any. Returns what waits for them, to be called once.

        Where all of them are beams, nothing is drawn, and all token ids are -1. The sequences must be in the order of
        `sort_key`.
        """
        num_rows = len(sequences)
        rows, token_ids = self._rows[:num_rows], self.token_ids[:num_rows]
        if sequences and all(seq.request.search is not None for seq in sequences):
            fetch = self.logprobs(logits, token_ids, max(seq.request.num_logprobs for seq in sequences))
            return lambda: ([-1] * num_rows, fetch())
        greedy = self._upload_rows(rows, sequences)

        end = num_rows
        if sequences and sequences[-1].logit_edits is not None:
            first_edited = bisect_left(sequences, 1, key=self.sort_key)
            end = bisect_left(sequences, 2, key=self.sort_key)
            self._edit(logits[first_edited:end], sequences[first_edited:end])
        if end == num_rows:  # views take CuPy microseconds
            self._backend.sample(token_ids, logits, rows, self.vocab_size, greedy=greedy)
        else:
            self._backend.sample(token_ids[:end], logits[:end], rows[:end], self.vocab_size, greedy=greedy)
        while end < num_rows:
            begin, end = end, min(end + self._max_copies(logits), num_rows)
            copies = self._copies[: end - begin]
            self._backend.copy(copies, logits[begin:end])
            self._edit(copies, sequences[begin:end])
            self._backend.sample(token_ids[begin:end], copies, rows[begin:end], self.vocab_size, greedy=greedy)

        asked = [k for seq in sequences if (k := seq.request.num_logprobs) is not None]
        fetch_ids = self._backend.fetch(token_ids)
        fetch_logprobs = self.logprobs(logits, token_ids, max(asked)) if asked else lambda: None
        return lambda: (fetch_ids().tolist(), fetch_logprobs())

    @staticmethod
    def sort_key(seq: Sequence) -> int:
        """Rows that are drawn from as they are stand before those that are edited in place (1), and these before those
        of which a copy is edited (2), since log probabilities are wanted of the raw logits."""
        if seq.logit_edits is None:
            return 0
        return 1 if seq.request.num_logprobs is None else 2

    def _upload_rows(self, rows: Array, sequences: list[Sequence]) -> bool:
        """Unless they are there from the step before: rows that are all greedy, which is returned, don't change."""
        if self._uploaded_rows is not None and sequences == self._uploaded_for:
            return True
        for seq in sequences:
            if self._row_owners[seq.row] is not seq:
                self._row_owners[seq.row] = seq
                self._host_rows[seq.row] = _sampling_row(seq)
        host_rows, content = self._host_rows[[seq.row for seq in sequences]], None
        if host_rows["temperature"].any():
            host_rows["counter"] = [len(seq.token_ids) - seq.num_prompt_tokens for seq in sequences]
        else:
            self._uploaded_for = sequences
            content = host_rows.tobytes()
            if content == self._uploaded_rows:
                return True
        self._uploaded_rows = None  # should the copy fail
        self._backend.copy_in(rows, host_rows)
        self._uploaded_rows = content
        return content is not None

    def forget_rows(self) -> None:
        """The sequences' parameters may not be where they were copied to."""
        self._uploaded_rows = None

    def _max_copies(self, logits: Array) -> int:
        """How many rows may be copied at a time."""
        if self._copies is None:
            row_size = logits.shape[1]
            num_rows = max(1, min(self._max_num_seqs, COPY_BYTES // (4 * row_size)))
            self._copies = self._backend.empty((num_rows, row_size), np.float32)
        return self._copies.shape[0]

    def _edit(self, logits: Array, sequences: list[Sequence]) -> None:
        """Do to each sequence's row of logits what its request asks for. All of them have logit_edits."""
        if not sequences:
            return
        for row, seq in enumerate(sequences):
            if seq.logit_edits.rules.processors:
                self._process(logits[row, : self.vocab_size], seq)
        masks = [seq.logit_edits.rules.allowed_mask for seq in sequences]
        masked = [row for row, mask in enumerate(masks) if mask is not None]
        if masked:
            device_rows = self._mask_rows.of(np.array(masked, np.int32))
            device_masks = self._masks.of(np.stack([masks[row] for row in masked]))
            self._backend.keep_allowed(logits, device_rows, device_masks, self.vocab_size)
        edits = self._edits_of_rows.join([seq.logit_edits.after(seq.token_ids) for seq in sequences])
        self._backend.edit_logits(logits, self._edits.of(edits))

    def _process(self, logits: Array, seq: Sequence) -> None:
        """Let the request's logits_processors have its row of logits [vocab_size]."""
        try:
            processed = seq.logit_edits.rules.process(seq.token_ids, logits)
        except ValueError as error:
            seq.error = str(error)
            self._backend.copy_in(logits, np.full(logits.shape, -np.inf, np.float32))  # nothing can be drawn
            return
        if processed is not logits:
            self._backend.copy(logits, processed)

    def logprobs(self, logits: Array, token_ids: Array, k: int) -> Callable[[], Logprobs]:
        """Of token_ids [num_rows] int32, at most max_num_seqs, and of the k likeliest tokens in each row of logits.
        Returns what waits for them, to be called once."""
        num_rows, columns = len(token_ids), 1 + min(k, self.vocab_size)
        found = self._found[: num_rows * (2 * columns + 1)]
        self._backend.logprobs(*_split(found, num_rows, columns), logits, token_ids, self.vocab_size)
        fetch = self._backend.fetch(found)
        return lambda: Logprobs(*_split(fetch(), num_rows, columns))


def _split(found: Array, num_rows: int, columns: int) -> tuple[Array, Array, Array]:
    """Logprobs' arrays, where they lie one after the other in an array of int32."""
    size = num_rows * columns
    shape = (num_rows, columns)
    return found[:size].reshape(shape), found[size : 2 * size].view(np.float32).reshape(shape), found[2 * size :]


def _sampling_row(seq: Sequence) -> tuple:
    params = seq.request.params
    temperature = 0.0 if params.greedy else params.temperature
    return temperature, params.top_p, params.min_p, max(params.top_k, 0), seq.seed, 0


class _Upload:
    """Arrays of one dtype that go up to the backend, one at a time, into memory that grows when it must."""

    def __init__(self, backend: Backend, dtype):
        self._backend = backend
        self._dtype = dtype
        self._memory: Array | None = None

    def of(self, values: np.ndarray) -> Array:
        """The values as an array of the backend, valid until the next call."""
        if self._memory is None or self._memory.shape[0] < values.size:
            self._memory = self._backend.empty((max(256, 2 * values.size),), self._dtype)
        array = self._memory[: values.size].reshape(values.shape)
        self._backend.copy_in(array, values)
        return array
