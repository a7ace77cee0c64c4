"""What steps are padded to, and when they are captured; tests/kernels/test_step_graphs.py runs them."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fake_model import make_engine, params_of, prompt_of, run_all

from cupaged.engine.batch import Batch
from cupaged.engine.block_pool import NULL_BLOCK
from cupaged.engine.step_graphs import BATCH_SIZES, MAX_GRAPHS, MAX_PROMPTS, StepGraphs
from cupaged.kernels.linear_small import MAX_ROWS
from cupaged.kernels.tuning import SPLIT_ROWS


class RecordingBackend:
    """Its captures run what they recorded; `error` makes them fail."""

    error: Exception | None = None
    num_captures = num_launches = 0

    def address(self, array):
        return array.ctypes.data

    def capture(self, function):
        self.num_captures += 1
        function()
        if self.error is not None:
            raise self.error

        def launch():
            self.num_launches += 1
            function()

        return launch


class SumDecoder:
    num_steps = 0

    def forward(self, batch, arena):
        self.num_steps += 1
        return batch.token_ids[batch.logits_indices, None] + batch.positions.sum()


def make_graphs(
    backend=None, decoder=None, *, block_size=16, max_num_tokens=2048, max_num_seqs=256, max_model_len=1 << 20
):
    arena = SimpleNamespace(layout=SimpleNamespace(block_size=block_size))
    return StepGraphs(
        backend or RecordingBackend(),
        decoder or SumDecoder(),
        arena,
        max_num_tokens=max_num_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
    )


def decode_batch(num_seqs: int, max_seq_len: int = 40, block_size: int = 16) -> Batch:
    rng = np.random.default_rng(num_seqs)

    def ids(*shape):
        return rng.integers(1, 1000, shape).astype(np.int32)

    seq_lens = rng.integers(1, max_seq_len + 1, num_seqs).astype(np.int32)
    seq_lens[rng.integers(num_seqs)] = max_seq_len
    return Batch(
        token_ids=ids(num_seqs), positions=seq_lens - 1, slot_mapping=ids(num_seqs),
        query_start_loc=np.arange(num_seqs + 1, dtype=np.int32), seq_lens=seq_lens,
        block_tables=ids(num_seqs, -(-max_seq_len // block_size)),
        logits_indices=rng.permutation(num_seqs).astype(np.int32), num_decodes=num_seqs, max_query_len=0,
        max_seq_len=max_seq_len,
    )  # fmt: skip


@pytest.mark.parametrize("max_num_seqs", [1, 3, 8, 15, 100, 256, 512, 1000])
def test_batches_are_padded_to_few_sizes(max_num_seqs):
    graphs, sizes = make_graphs(max_num_seqs=max_num_seqs), set()
    for n in range(1, max_num_seqs + 1):
        batch = decode_batch(n)
        padded = graphs.pad(batch)
        if n > 512:
            assert padded is batch
            continue
        size = padded.num_seqs
        assert n <= size <= max_num_seqs
        sizes.add(size)
        # No edge between two matrix kernels lies between n and its size: it would change the sums' order.
        assert -(-n // 8) == -(-size // 8) or (n > 256 and -(-n // 16) == -(-size // 16))
        assert (n <= MAX_ROWS, n <= SPLIT_ROWS) == (size <= MAX_ROWS, size <= SPLIT_ROWS)
        assert -(-n // 128) == -(-size // 128)  # nor one that depends on the number of tiles

        assert padded.num_decodes == padded.num_tokens == size
        assert padded.max_query_len == 0
        for name, padding in (("token_ids", 0), ("positions", 0), ("slot_mapping", -1), ("seq_lens", 0)):
            array = getattr(padded, name)
            assert array[:n].tolist() == getattr(batch, name).tolist()
            assert array[n:].tolist() == [padding] * (size - n)
        assert padded.logits_indices.tolist() == batch.logits_indices.tolist() + [0] * (size - n)
        assert padded.query_start_loc.tolist() == list(range(size + 1))
        assert np.array_equal(padded.block_tables[:n, :3], batch.block_tables)
        assert (padded.block_tables[n:] == NULL_BLOCK).all()
        assert (padded.block_tables[:, 3:] == NULL_BLOCK).all()
        for name, array in vars(padded).items():
            if isinstance(array, np.ndarray):
                assert (array.dtype, array.flags.c_contiguous) == (np.int32, True), name
        assert graphs.pad(padded).block_tables.shape == padded.block_tables.shape  # a shape of its own
    assert sizes == {size for size in BATCH_SIZES if size < max_num_seqs} | (
        {max_num_seqs} if max_num_seqs <= 512 else set()
    )


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, 256), (255, 256), (256, 256), (257, 512), (512, 512), (513, 1000), (1000, 1000)],
)
@pytest.mark.parametrize("block_size", [8, 64])
def test_lengths_are_padded_to_powers_of_two(length, expected, block_size):
    graphs = make_graphs(block_size=block_size, max_model_len=1000)
    padded = graphs.pad(decode_batch(3, length, block_size))
    assert padded.max_seq_len == expected
    assert padded.block_tables.shape == (4, -(-expected // block_size))


@pytest.mark.parametrize(("length", "expected"), [(256, 256), (257, 512), (2049, 4096), (4097, 5000)])
def test_lengths_of_steps_with_prompts_are_padded_too(length, expected):
    padded = make_graphs(max_model_len=5000).pad(mixed_batch(3, [9], length))
    assert padded.max_seq_len == expected
    assert padded.block_tables.shape == (5, -(-expected // 16))


def test_short_models_have_short_tables():
    assert make_graphs(max_model_len=100).pad(decode_batch(3)).block_tables.shape == (4, 7)


def mixed_batch(num_decodes: int, query_lens: list[int], max_seq_len: int = 40, block_size: int = 16) -> Batch:
    """Beside decodes, prompts of which so many tokens are computed."""
    rng = np.random.default_rng(num_decodes)
    lens = np.array([1] * num_decodes + query_lens)
    seq_lens = rng.integers(lens, max(max_seq_len, *lens) + 1).astype(np.int32)
    seq_lens[-1] = max_seq_len = max(max_seq_len, *query_lens)
    starts = np.append(0, np.cumsum(lens)).astype(np.int32)
    positions = np.concatenate([np.arange(end - num, end) for num, end in zip(lens, seq_lens, strict=True)])
    return Batch(
        token_ids=rng.integers(1, 1000, starts[-1]).astype(np.int32), positions=positions.astype(np.int32),
        slot_mapping=rng.integers(1, 1000, starts[-1]).astype(np.int32), query_start_loc=starts, seq_lens=seq_lens,
        block_tables=rng.integers(1, 1000, (len(lens), -(-max_seq_len // block_size))).astype(np.int32),
        logits_indices=rng.permutation(starts[1:] - 1).astype(np.int32), num_decodes=num_decodes,
        max_query_len=max(query_lens), max_seq_len=max_seq_len,
    )  # fmt: skip


def sequences_of(batch: Batch) -> list[tuple]:
    """All that a step does for each sequence that has tokens, and the places of its logits in the step's."""
    found = []
    for i, (start, end) in enumerate(zip(batch.query_start_loc, batch.query_start_loc[1:], strict=False)):
        if batch.seq_lens[i] == 0:
            continue
        tokens = (array[start:end].tolist() for array in (batch.token_ids, batch.positions, batch.slot_mapping))
        table = batch.block_tables[i, : -(-batch.seq_lens[i] // 16)].tolist()
        logits = (batch.logits_indices == end - 1).nonzero()[0][:1].tolist()
        found.append((*tokens, batch.seq_lens[i], table, logits, i < batch.num_decodes))
    return found


@pytest.mark.parametrize(
    ("num_decodes", "query_lens", "shape"),
    [  # tokens, decodes, sequences, logits, max_query_len
        (0, [2], (16, 0, 1, 1, 2)),
        (0, [17], (64, 0, 1, 1, 32)),
        (1, [15], (16, 1, 2, 2, 16)),
        (62, [64], (128, 64, 65, 64, 64)),
        (61, [3, 60, 5], (192, 64, 68, 64, 64)),
        (130, [62], (192, 130, 131, 136, 64)),  # 136 decodes would make 198 tokens
        (200, [300, 12], (512, 200, 202, 208, 512)),
        (0, [150], (192, 0, 1, 1, 192)),
        (96, [*range(2, 18)], (256, 96, 112, 112, 32)),
        (255, [20], (320, 255, 256, 256, 32)),  # no more than 256 sequences
    ],
)
def test_small_steps_with_prompts_are_padded(num_decodes, query_lens, shape):
    batch = mixed_batch(num_decodes, query_lens)
    graphs = make_graphs()
    padded = graphs.pad(batch)
    found = padded.num_tokens, padded.num_decodes, padded.num_seqs, len(padded.logits_indices), padded.max_query_len
    assert found == shape
    assert sequences_of(padded) == sequences_of(batch)
    assert [len(array) for array in (padded.token_ids, padded.positions, padded.slot_mapping)] == [shape[0]] * 3
    assert (padded.slot_mapping == -1).sum() == shape[0] - batch.num_tokens
    assert padded.query_start_loc[0] == 0
    assert (np.diff(padded.query_start_loc)[: shape[1]] == 1).all()
    assert padded.query_start_loc[-1] == batch.num_tokens + shape[1] - num_decodes
    assert (padded.logits_indices[batch.num_seqs :] == 0).all()
    assert padded.block_tables.shape == (shape[2], padded.max_seq_len // 16)
    for name, array in vars(padded).items():
        if isinstance(array, np.ndarray):
            assert (array.dtype, array.flags.c_contiguous) == (np.int32, True), name
    again = graphs.pad(padded)  # a shape of its own
    assert all(np.array_equal(value, vars(again)[name]) for name, value in vars(padded).items())


def test_the_decoding_sequences_may_want_fewer_logits_or_several_of_a_token():
    batch = decode_batch(6)
    for indices in (np.arange(5, dtype=np.int32), np.zeros(7, np.int32), np.zeros(0, np.int32)):
        padded = make_graphs().pad(replace(batch, logits_indices=indices))
        assert padded.num_seqs == 8
        assert padded.logits_indices.tolist() == indices.tolist() + [0] * (-len(indices) % 8)


@pytest.mark.parametrize(
    ("batch", "limits"),
    [
        (mixed_batch(6, [507]), {}),
        (mixed_batch(6, [2] * (MAX_PROMPTS + 1)), {}),
        (mixed_batch(6, [60]), {"max_num_tokens": 127}),  # 128 would be the next
        (mixed_batch(6, [4]), {"max_num_tokens": 15}),
        (decode_batch(257), {}),
        (replace(decode_batch(200), logits_indices=np.zeros(257, np.int32)), {}),
    ],
)
def test_other_steps_run_as_they_are(batch, limits):
    backend, decoder = RecordingBackend(), SumDecoder()
    graphs = make_graphs(backend, decoder, **limits)
    assert graphs.pad(batch) is batch
    for _ in range(3):
        assert graphs.forward(batch).shape[0] == batch.logits_indices.shape[0]
    assert (decoder.num_steps, backend.num_captures, graphs.num_graphs) == (3, 0, 0)


def test_a_shape_with_prompts_is_captured_when_it_comes_again():
    backend, decoder = RecordingBackend(), SumDecoder()
    graphs, batch = make_graphs(backend, decoder), make_graphs().pad(mixed_batch(6, [40]))
    first = graphs.forward(batch)
    assert (decoder.num_steps, backend.num_captures, graphs.num_graphs) == (1, 0, 0)
    for num_launches in (1, 2):
        assert np.array_equal(graphs.forward(batch), first)
        assert (backend.num_captures, backend.num_launches, graphs.num_graphs) == (1, num_launches, 1)
    graphs.forward(replace(batch, max_query_len=32))
    assert (backend.num_captures, backend.num_launches) == (1, 2)


def others_of(num_decodes: int, query_lens: list[int], count: int) -> list[Batch]:
    """Batches whose arrays lie elsewhere, as if they were of other shapes."""
    batch = make_graphs().pad(mixed_batch(num_decodes, query_lens))
    return [replace(batch, token_ids=batch.token_ids.copy()) for _ in range(count)]


def test_shapes_that_were_not_met_for_long_are_forgotten():
    backend = RecordingBackend()
    graphs, often, once = make_graphs(backend), *(make_graphs().pad(decode_batch(n)) for n in (6, 20))
    others = others_of(6, [40], MAX_GRAPHS + 1)
    graphs.forward(once)
    graphs.forward(often)
    for other in others:  # which take no graph's place
        graphs.forward(other)
    assert (backend.num_captures, graphs.num_graphs) == (2, 2)
    graphs.forward(others[0])  # whose first time is forgotten
    assert backend.num_captures == 2
    for other in others[2:]:
        graphs.forward(other)
        graphs.forward(often)
    assert (backend.num_captures, graphs.num_graphs) == (2 + MAX_GRAPHS - 1, MAX_GRAPHS)
    graphs.forward(often)
    assert backend.num_captures == 2 + MAX_GRAPHS - 1
    graphs.forward(once)
    assert backend.num_captures == 2 + MAX_GRAPHS


def test_a_failed_capture_costs_no_graph():
    backend = RecordingBackend()
    graphs, captured = make_graphs(backend), make_graphs().pad(decode_batch(6))
    graphs.forward(captured)
    backend.error = RuntimeError("no room")
    others = others_of(6, [40], MAX_GRAPHS)
    for other in others * 3:
        graphs.forward(other)
    assert (backend.num_captures, graphs.num_graphs) == (2, 1)
    graphs.forward(captured)
    assert backend.num_launches == 1


def test_a_shape_is_captured_once():
    backend, decoder = RecordingBackend(), SumDecoder()
    graphs, batch = make_graphs(backend, decoder), make_graphs().pad(decode_batch(6))
    first = graphs.forward(batch).copy()
    assert (decoder.num_steps, backend.num_captures, backend.num_launches) == (2, 1, 0)
    assert np.array_equal(graphs.forward(batch), first)
    assert (backend.num_captures, backend.num_launches, graphs.num_graphs) == (1, 1, 1)

    moved = replace(batch, token_ids=batch.token_ids.copy())  # no launch may be given arrays of other steps
    longer = replace(batch, max_seq_len=512)
    for other in (moved, longer):
        graphs.forward(other)
    assert (backend.num_captures, backend.num_launches, graphs.num_graphs) == (3, 1, 3)


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted\nstack"), MemoryError()])
def test_without_captures_steps_go_on(caplog, error):
    backend = RecordingBackend()
    graphs = make_graphs(backend)
    captured, other = (graphs.pad(decode_batch(n)) for n in (6, 20))
    graphs.forward(captured)
    backend.error = error
    with caplog.at_level(logging.WARNING):
        expected = SumDecoder().forward(other, None)
        for _ in range(3):
            assert np.array_equal(graphs.forward(other), expected)
        graphs.forward(graphs.pad(decode_batch(30)))
    [record] = caplog.records
    assert record.getMessage().endswith(("captured: operation not permitted", "captured: MemoryError"))
    assert (backend.num_captures, graphs.num_graphs) == (2, 1)
    graphs.forward(captured)
    assert backend.num_launches == 1  # what is there is still used


def test_the_cpu_captures_nothing():
    engine = make_engine()
    for i in range(3):
        engine.add_request(str(i), prompt_of(5, i), params_of())
    run_all(engine)
    assert engine.stats().num_graphs == 0
    assert engine.runner.decoder.batches[-1] == (3, [1, 1, 1])  # and pads nothing
