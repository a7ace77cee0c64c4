"""One step's work, flattened over tokens: the same layout for prefill, chunks of prefill and decode, mixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cupaged.engine.block_pool import NULL_BLOCK

if TYPE_CHECKING:
    from cupaged.engine.scheduler import Schedule

Array = Any  # numpy.ndarray on the host; after Backend.upload_batch an array of the backend


@dataclass
class Batch:
    """All arrays are int32 and C-contiguous. Sequences that decode (one query token) stand before the others.

    Token t of the step belongs to sequence i when query_start_loc[i] <= t < query_start_loc[i + 1]. The tokens of
    sequence i are the last ones of its seq_lens[i] tokens: token j (from 0) of its q = query_start_loc[i + 1] -
    query_start_loc[i] stands at position seq_lens[i] - q + j and attends to positions 0 .. seq_lens[i] - q + j.
    """

    token_ids: Array  # [num_tokens]
    positions: Array  # [num_tokens] from 0
    slot_mapping: Array  # [num_tokens] block id * block_size + offset; -1 writes nothing
    query_start_loc: Array  # [num_seqs + 1] prefix sums of the query lengths
    seq_lens: Array  # [num_seqs] tokens attended to, this step's included; 0 only in padding
    # [num_seqs, max_blocks] block ids in token order; entries past seq_len are never read, nor those wholly before the
    # sliding window of the first query token, which are -1.
    block_tables: Array
    logits_indices: Array  # [num_logits] tokens of the step whose logits are wanted
    num_decodes: int  # leading sequences with exactly one query token
    max_query_len: int  # over the sequences after the decodes; 0 when there are none
    max_seq_len: int

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]


class BatchBuilder:
    """Turns schedules into batches.

    It keeps the block tables of the running sequences, a row each, and adds only what a step brought, so that a
    step costs a few NumPy calls and one look at each sequence, however long they are.

    window: the model's, in tokens; None for none.
    """

    def __init__(self, *, max_num_seqs: int, max_model_len: int, block_size: int, window: int | None = None):
        self.block_size = block_size
        self.window = window
        self._block_tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self._num_blocks = [0] * max_num_seqs  # how much of each row is up to date
        # Whose tables the rows hold. A sequence gets a new list whenever it loses its blocks, so the list itself
        # tells whether a row is still its own.
        self._sources: list[list[int] | None] = [None] * max_num_seqs

    def build(self, schedule: Schedule, sampled: list[int]) -> Batch:
        """The batch of `schedule`, with the logits of the last tokens of the sequences at indices `sampled`, in that
        order; an index may come several times."""
        sequences, num_decodes = schedule.sequences, schedule.num_decodes
        num_blocks, sources = self._num_blocks, self._sources
        for seq in sequences:
            row, block_table = seq.row, seq.block_table
            if num_blocks[row] != len(block_table) or sources[row] is not block_table:
                self._update_row(row, block_table)
        rows = np.array([seq.row for seq in sequences])
        num_cached = np.array([seq.num_cached_tokens for seq in sequences], np.int32)
        decoded = [seq.token_ids[seq.num_cached_tokens] for seq in sequences[:num_decodes]]

        if num_decodes == len(sequences):
            token_ids, positions, rows_of_tokens = np.array(decoded, np.int32), num_cached, rows
            seq_lens, query_start_loc = num_cached + np.int32(1), np.arange(len(sequences) + 1, dtype=np.int32)
        else:
            num_tokens = np.array(schedule.num_tokens, np.int32)
            seq_lens = num_cached + num_tokens
            query_start_loc = np.zeros(len(sequences) + 1, np.int32)
            np.cumsum(num_tokens, out=query_start_loc[1:])
            token_ids = np.empty(query_start_loc[-1], np.int32)
            token_ids[:num_decodes] = decoded
            for i in range(num_decodes, len(sequences)):
                seq, start = sequences[i], sequences[i].num_cached_tokens
                chunk = seq.token_ids[start : start + schedule.num_tokens[i]]
                token_ids[query_start_loc[i] : query_start_loc[i + 1]] = chunk
            positions = np.arange(len(token_ids), dtype=np.int32)
            positions += np.repeat(num_cached - query_start_loc[:-1], num_tokens)
            rows_of_tokens = np.repeat(rows, num_tokens)
        max_seq_len = int(seq_lens.max())
        block_ids = self._block_tables[rows_of_tokens, positions // self.block_size]
        slot_mapping = block_ids * self.block_size + positions % self.block_size

        block_tables = self._block_tables[rows, : -(-max_seq_len // self.block_size)]
        if self.window is not None:
            first_needed = (num_cached + 1 - self.window) // self.block_size
            block_tables[np.arange(block_tables.shape[1]) < first_needed[:, None]] = NULL_BLOCK

        return Batch(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slot_mapping,
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            block_tables=block_tables,
            logits_indices=query_start_loc[1:][sampled] - np.int32(1),
            num_decodes=num_decodes,
            max_query_len=max(schedule.num_tokens[num_decodes:], default=0),
            max_seq_len=max_seq_len,
        )

    def _update_row(self, row: int, block_table: list[int]) -> None:
        known = self._num_blocks[row]
        if self._sources[row] is not block_table:
            self._sources[row] = block_table
            known = 0
        if known != len(block_table):
            self._block_tables[row, known : len(block_table)] = block_table[known:]
            self._num_blocks[row] = len(block_table)
