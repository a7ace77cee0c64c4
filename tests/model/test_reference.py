"""Each operation of the NumPy backend against its formula in float64."""

import numpy as np
import pytest

from cupaged.backends import reference
from cupaged.backends.reference import MAX_GEMV_ROWS, ReferenceBackend
from cupaged.engine.batch import Batch
from cupaged.errors import OutOfMemoryError
from cupaged.memory.arena import KVArena, KVLayout

EPSILON = 2.0**-24  # float32's rounding


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def normal(rng, *shape) -> np.ndarray:
    values = rng.standard_normal(shape, np.float32)
    values.flat[0] = 30  # an outlier, so that a lost element shows
    return values


def poisoned(*shape) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


def rms_norm(x, weight, eps):
    x = np.float64(x)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize("n", [0, 1, 5])
def test_embedding(backend, rng, n):
    weight, ids, out = normal(rng, 7, 16), rng.integers(0, 7, n, np.int32), poisoned(n, 16)
    backend.embedding(out, weight, ids)
    assert (out == np.array([weight[i] for i in ids]).reshape(n, 16)).all()


@pytest.mark.parametrize("n", [0, 1, 5])
def test_rms_norm(backend, rng, n):
    x, weight, out = normal(rng, 6, 96)[:n], normal(rng, 96), poisoned(n, 96)
    backend.rms_norm(out, x, weight, 1e-6)
    assert np.allclose(out, rms_norm(x, weight, 1e-6), rtol=20 * EPSILON, atol=0)


def test_rms_norm_of_zeros_and_of_tiny_values_is_held_by_eps(backend):
    x, out = np.array([[0] * 8, [1e-3] * 8], np.float32), poisoned(2, 8)
    backend.rms_norm(out, x, np.ones(8, np.float32), 1e-6)
    assert (out[0] == 0).all()
    assert np.allclose(out[1], 1e-3 / np.sqrt(2e-6), rtol=1e-6)


@pytest.mark.parametrize("m", [0, 1, 2, MAX_GEMV_ROWS, MAX_GEMV_ROWS + 1, 40])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_linear(backend, rng, m, biased, accumulate):
    x, weight = normal(rng, 41, 96)[:m], normal(rng, 130, 96)
    before = normal(rng, 41, 130)[:m] if accumulate else np.zeros((m, 130))
    out = np.array(before, np.float32) if accumulate else poisoned(m, 130)
    bias = normal(rng, 130) if biased else None
    backend.linear(out, x, weight, bias, accumulate=accumulate)
    exact = before + np.float64(x) @ np.float64(weight).T + (np.float64(bias) if biased else 0)
    bound = 96 * EPSILON * (np.abs(x) @ np.abs(weight).T + np.abs(before) + 30)
    assert (np.abs(out - exact) <= bound).all()


@pytest.mark.parametrize("m", [0, 1, 2, MAX_GEMV_ROWS + 1])
def test_linear_silu_and_mul(backend, rng, m):
    x, gate, up, out = normal(rng, 9, 16)[:m], normal(rng, 48, 16), normal(rng, 48, 16), poisoned(m, 48)
    x[:, 0] = 1
    gate[:4] = np.array([-200, -80, 0, 200])[:, None] * np.eye(16)[0]  # exp(200) is infinite in float32
    backend.linear_silu_and_mul(out, x, np.stack([gate, up], axis=1).reshape(96, 16))
    g, u = (np.float64(x) @ np.float64(matrix).T for matrix in (gate, up))
    bounds = [16 * EPSILON * np.abs(x) @ np.abs(matrix).T for matrix in (gate, up)]
    # silu's slope is 1.1 at most.
    bound = 1.2 * bounds[0] * np.abs(u) + np.abs(g) * bounds[1] + 10 * EPSILON * np.abs(g * u)
    assert (np.abs(out - g / (1 + np.exp(-g)) * u) <= bound).all()


# -- the cache -------------------------------------------------------------------------------------------------


def new_arena(backend, *, num_kv_heads=2, block_size=8, head_dim=16, num_layers=2, num_slabs=2, blocks_per_slab=16):
    """An arena full of NaN."""
    layout = KVLayout(num_layers, num_kv_heads, block_size, head_dim, backend.dtype, blocks_per_slab)
    arena = KVArena(layout, backend, num_slabs * blocks_per_slab)
    while arena.grow():
        arena.slabs[-1].fill(np.nan)
    return arena


def cell(arena, layer, part, slot):
    """The [num_kv_heads, head_dim] place of one token."""
    block, offset = divmod(int(slot), arena.layout.block_size)
    slab, index = divmod(block, arena.layout.blocks_per_slab)
    return arena.slabs[slab][layer, part, index, :, offset]


@pytest.mark.parametrize("rotary_dim", [16, 8])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("slots", [[5], [-1], [3, -1, 140, 131, 255, 8]])
def test_rope_and_store_kv(backend, rng, rotary_dim, normed, slots):
    num_heads, num_kv_heads, head_dim, n = 6, 2, 16, len(slots)
    arena = new_arena(backend)
    qkv = normal(rng, n, (num_heads + 2 * num_kv_heads) * head_dim)
    positions = rng.integers(0, 50, n, np.int32)
    angles = np.arange(50)[:, None] * 100.0 ** (-np.arange(rotary_dim // 2) / 8)
    cos_sin = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    q_norm, k_norm = (normal(rng, head_dim), normal(rng, head_dim)) if normed else (None, None)

    heads = np.float64(qkv).reshape(n, -1, head_dim)
    q, k, v = np.split(heads, [num_heads, num_heads + num_kv_heads], axis=1)
    if normed:
        q, k = rms_norm(q, q_norm, 1e-6), rms_norm(k, k_norm, 1e-6)

    def rotate(x):
        pairs = x[..., : rotary_dim // 2] + 1j * x[..., rotary_dim // 2 : rotary_dim]
        turned = pairs * np.exp(1j * angles[positions])[:, None]
        return np.concatenate([turned.real, turned.imag, x[..., rotary_dim:]], axis=-1)

    backend.rope_and_store_kv(
        qkv, arena, 1, positions, np.array(slots, np.int32), cos_sin, num_heads, q_norm, k_norm, 1e-6
    )
    assert np.allclose(qkv.reshape(n, -1, head_dim)[:, :num_heads], rotate(q), rtol=1e-5, atol=1e-5)
    for token, slot in enumerate(slots):
        if slot >= 0:
            assert np.allclose(cell(arena, 1, 0, slot), rotate(k)[token], rtol=1e-5, atol=1e-5)
            assert (cell(arena, 1, 1, slot) == v[token]).all()
            cell(arena, 1, 0, slot)[:] = cell(arena, 1, 1, slot)[:] = np.nan
    assert all(np.isnan(slab).all() for slab in arena.slabs), "written outside of the slots"


@pytest.mark.parametrize("blocks_per_slab", [8, 32])
def test_copy_blocks_between_arenas(backend, rng, blocks_per_slab):
    src, dst = new_arena(backend), new_arena(backend, blocks_per_slab=blocks_per_slab)
    for slab in src.slabs:
        slab[...] = rng.standard_normal(slab.shape)
    pairs = np.stack([rng.integers(0, 32, 7), rng.permutation(2 * blocks_per_slab)[:7]], axis=1).astype(np.int32)
    backend.copy_blocks(dst, src, pairs)
    for src_id, dst_id in pairs:
        for layer in range(2):
            for part in range(2):
                for offset in range(8):
                    copied = cell(dst, layer, part, dst_id * 8 + offset)
                    assert (copied == cell(src, layer, part, src_id * 8 + offset)).all()
                    copied[:] = np.nan
    assert all(np.isnan(slab).all() for slab in dst.slabs), "written outside of the destinations"


def test_copy_blocks_within_an_arena(backend, rng):
    arena = new_arena(backend)
    for slab in arena.slabs:
        slab[...] = rng.standard_normal(slab.shape)
    expected = np.concatenate(arena.slabs, axis=2)
    expected[:, :, [3, 20, 31]] = expected[:, :, [17, 17, 4]]
    backend.copy_blocks(arena, arena, np.array([[17, 3], [17, 20], [4, 31]], np.int32))
    assert (np.concatenate(arena.slabs, axis=2) == expected).all()
    backend.copy_blocks(arena, arena, np.empty((0, 2), np.int32))
    assert (np.concatenate(arena.slabs, axis=2) == expected).all()


def attention(q, keys, values, position, window):
    """One query head [head_dim] over keys and values [tokens, head_dim] in float64."""
    seen = slice(max(0, position - window + 1) if window else 0, position + 1)
    scores = np.float64(keys[seen]) @ np.float64(q) / np.sqrt(q.size)
    weights = np.exp(scores - scores.max())
    return weights @ np.float64(values[seen]) / weights.sum()


QUERY_AND_SEQ_LENS = {
    "one": [(1, 1)],
    "decodes": [(1, 1), (1, 8), (1, 9), (1, 77)],
    "prompts": [(1, 1), (2, 2), (8, 8), (33, 33)],
    "mixed": [(1, 30), (1, 0), (3, 20), (40, 41), (17, 90)],
}


@pytest.mark.parametrize("num_slabs", [1, 2])
@pytest.mark.parametrize("num_heads", [2, 6])
@pytest.mark.parametrize("window", [0, 1, 5, 16, 1000])
@pytest.mark.parametrize("tile_scores", [1, 1000, 1 << 20])
@pytest.mark.parametrize("lengths", QUERY_AND_SEQ_LENS.values(), ids=QUERY_AND_SEQ_LENS)
def test_paged_attention(backend, rng, monkeypatch, lengths, tile_scores, window, num_heads, num_slabs):
    monkeypatch.setattr(reference, "TILE_SCORES", tile_scores)
    arena = new_arena(backend, num_slabs=num_slabs, blocks_per_slab=64 // num_slabs)
    num_kv_heads, block_size, head_dim = 2, arena.layout.block_size, arena.layout.head_dim
    free = rng.permutation(64).tolist()
    starts = np.cumsum([0] + [q for q, _ in lengths]).astype(np.int32)
    tables = np.full((len(lengths), 16), 1 << 30, np.int32)
    qkv = poisoned(starts[-1], (num_heads + 2 * num_kv_heads) * head_dim)  # only the queries may be read
    q = qkv.reshape(starts[-1], -1, head_dim)[:, :num_heads]
    q[...] = 2 * rng.standard_normal(q.shape)
    q[-1, 0] *= 20  # a softmax that is nearly one-hot
    expected = np.zeros((starts[-1], num_heads, head_dim))
    for i, (query_len, seq_len) in enumerate(lengths):
        keys, values = (
            normal(rng, seq_len + 1, num_kv_heads, head_dim),
            normal(rng, seq_len + 1, num_kv_heads, head_dim),
        )
        unread = max(0, seq_len - query_len - window + 1) if window else 0  # tokens that left the window
        for token in range(seq_len):
            if token % block_size == 0:
                tables[i, token // block_size] = free.pop()
            if token >= unread:
                slot = tables[i, token // block_size] * block_size + token % block_size
                cell(arena, 1, 0, slot)[:], cell(arena, 1, 1, slot)[:] = keys[token], values[token]
        tables[i, : unread // block_size] = 1 << 30  # their blocks may have been given away
        for j in range(query_len if seq_len else 0):
            for head in range(num_heads):
                group = head // (num_heads // num_kv_heads)
                expected[starts[i] + j, head] = attention(
                    q[starts[i] + j, head], keys[:, group], values[:, group], seq_len - query_len + j, window
                )
    empty = np.empty(0, np.int32)
    seq_lens = np.array([s for _, s in lengths], np.int32)
    batch = Batch(np.zeros(starts[-1], np.int32), empty, empty, starts, seq_lens, tables, empty, 0, 0, 0)

    for given in (batch, backend.upload_batch(batch)):
        out = poisoned(starts[-1], num_heads * head_dim)
        backend.paged_attention(out, qkv, arena, 1, given, num_heads, head_dim**-0.5, window)
        assert (np.abs(out.reshape(expected.shape) - expected) <= 1e-5 * (1 + np.abs(expected).max())).all()


def test_upload_is_a_copy(backend):
    arrays = [np.arange(3, dtype=np.int32) for _ in range(5)] + [
        np.zeros((2, 1), np.int32),
        np.arange(3, dtype=np.int32),
    ]
    batch = Batch(*arrays, 1, 2, 3)
    uploaded = backend.upload_batch(batch)
    for array in arrays:
        array += 7
    assert uploaded.token_ids.tolist() == [0, 1, 2]
    assert uploaded.block_tables.tolist() == [[0], [0]]
    assert (uploaded.num_decodes, uploaded.max_query_len, uploaded.max_seq_len) == (1, 2, 3)


# -- memory ----------------------------------------------------------------------------------------------------


def test_memory_and_description(backend):
    free, total = backend.memory_info()
    assert 0 < free <= total
    assert "core" in backend.description
    array = backend.empty((3, 5), np.float16)
    assert (array.shape, array.dtype, array.flags.c_contiguous) == ((3, 5), np.float16, True)
    backend.copy_in(array, np.ones((3, 5)))
    copy = backend.to_host(array)
    array[:] = 2
    assert (copy == 1).all()
    with pytest.raises(ValueError, match=r"src: expected shape \(3, 5\); got \(5,\)"):
        backend.copy_in(array, np.ones(5))


@pytest.mark.parametrize("rows", [1 << 40, 1 << 70])
def test_too_large_an_array(rows):
    with pytest.raises(OutOfMemoryError, match=r"wanted .* GB .* GB are free.* lower"):
        ReferenceBackend().empty((rows, 4096), np.float32)
