"""One step's work, flattened over tokens: the same layout for prefill, chunks of prefill and decode, mixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    block_tables: Array  # [num_seqs, max_blocks] block ids in token order; entries past seq_len are never read
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
