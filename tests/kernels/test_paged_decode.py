"""paged_decode.cu and paged_decode_sm90.cu against attention in float64, over a shuffled, NaN-poisoned cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from host_device import H100

from attention_tools import assert_teeth, attention_reference, both_tiers, pack_qkv, pointed_query, with_kernels
from cupaged.backends.base import Rope
from cupaged.backends.cuda import probe
from cupaged.kernels import paged_decode as paged_decode_module
from cupaged.kernels import paged_decode_sm90 as paged_decode_sm90_module
from cupaged.kernels.checks import BFLOAT16, FLOAT16
from cupaged.kernels.device import device_info, set_device_info
from cupaged.kernels.paged_decode import KERNELS, MIN_SPLIT, decode_workspace_size, max_splits, paged_decode
from cupaged.kernels.paged_decode_sm90 import KERNELS_SM90
from cupaged.kernels.rope import rope_and_store_kv
from cupaged.memory.arena import KVLayout
from kernel_tools import HostRunner, PagedCache, assert_close, is_poison, poisoned, stored_rows


@dataclass(frozen=True)
class Case:
    head_dim: int
    block_size: int
    num_kv_heads: int
    group: int  # query heads a kv head
    seq_lens: tuple[int, ...]
    window: int = 0
    dtype: np.dtype = BFLOAT16

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    def __str__(self) -> str:
        lens = "_".join(map(str, self.seq_lens))
        return (
            f"d{self.head_dim}-b{self.block_size}-{self.num_kv_heads}x{self.group}-w{self.window}-{self.dtype}-{lens}"
        )


TILE_EDGES = (15, 16, 17, 31, 32, 33, 63, 64, 65)  # of the warps' keys and of whole tiles
SPLIT_EDGES = (MIN_SPLIT - 1, MIN_SPLIT, MIN_SPLIT + 1, 2 * MIN_SPLIT, 2 * MIN_SPLIT + 1)
CASES = [
    # blocks: empty, one token, and around the edge of each block size
    Case(64, 8, 2, 4, (0, 1, 7, 8, 9)),
    Case(64, 16, 3, 3, (15, 16, 17, 0, 1)),
    Case(64, 32, 1, 8, (1, 31, 32, 33, 0)),
    Case(64, 64, 2, 1, (63, 64, 65)),
    # head sizes, each with both types
    *(
        Case(head_dim, block_size, 1, group, (*TILE_EDGES[2 * i : 2 * i + 3], 300), dtype=dtype)
        for i, (head_dim, block_size, group) in enumerate([(80, 16, 7), (96, 8, 4), (128, 32, 8)])
        for dtype in (BFLOAT16, FLOAT16)
    ),
    Case(256, 16, 1, 4, TILE_EDGES),
    Case(256, 64, 2, 2, (33, 290), dtype=FLOAT16),
    Case(64, 16, 1, 4, TILE_EDGES, dtype=FLOAT16),
    # heads: one each, odd groups, a full tile of 16, one more than a tile, several tiles
    Case(64, 16, 5, 1, (40, 300)),
    Case(64, 16, 2, 7, (70,)),
    Case(64, 16, 2, 16, (40, 270)),
    Case(64, 16, 2, 17, (40, 270)),
    Case(64, 16, 1, 71, (33, 260)),
    # splits: around the edge of the first, sequences of different split counts together, and so many keys that splits
    # grow beyond MIN_SPLIT (a model with many kv heads has few splits)
    Case(64, 16, 1, 4, SPLIT_EDGES),
    Case(128, 16, 2, 4, (0, 1500, 3, 600, 257)),
    Case(64, 32, 16, 1, (8 * MIN_SPLIT, 8 * MIN_SPLIT + 1)),
    Case(64, 64, 32, 2, (4 * MIN_SPLIT + 1, 4 * MIN_SPLIT + 5 * 64)),
    Case(256, 16, 32, 1, (1100,)),
    # windows: one token, prime to the blocks, over several splits, of a split's own length, wider than the sequence
    Case(64, 16, 1, 4, (0, 1, 2, 17, 300), window=1),
    Case(64, 16, 2, 3, (12, 13, 14, 64, 77, 300), window=13),
    Case(128, 8, 1, 4, (299, 300, 301, 700, 1111), window=300, dtype=FLOAT16),
    Case(64, 32, 1, 2, (MIN_SPLIT, MIN_SPLIT + 1, 3 * MIN_SPLIT + 40), window=MIN_SPLIT),
    Case(256, 16, 1, 2, (97, 350), window=45),
    Case(80, 64, 1, 2, (65, 200), window=1000),
    # on Hopper: more sequences than a warp looks at together, and each block size for both sizes of a warp's tile
    Case(64, 16, 1, 2, (*range(0, 66, 2), 300, *range(1, 67, 3)), window=40),
    *(Case(128, block_size, 1, 5, (45, 0, 301), window) for block_size in (8, 16, 32, 64) for window in (0, 29)),
    *(Case(64, block_size, 1, 5, (45, 0, 301), dtype=FLOAT16) for block_size in (8, 16, 32, 64)),
    # there 8 heads or 16 share a pass over the keys
    *(Case(head_dim, 16, 1, group, (300, 31), dtype=FLOAT16) for head_dim in (64, 128) for group in (8, 9, 13)),
    Case(128, 16, 2, 16, (270,)),
]

CASES_AND_KERNELS = with_kernels(CASES, KERNELS, KERNELS_SM90)
in_both_tiers = both_tiers(KERNELS, KERNELS_SM90)


@pytest.fixture(autouse=True)
def few_multiprocessors():
    """Two: where thread blocks take work in turns, each gets several items."""
    set_device_info(replace(device_info() if probe().usable else H100, num_sms=2))
    yield
    set_device_info(None)


def spots(seq_len: int, window: int) -> list[int]:
    """Positions where a mistake would stand: the last key, the window's edge from both sides, the edges of splits."""
    edge = max(0, seq_len - window) if window else 0
    return [0, edge - 1, edge, MIN_SPLIT - 1, MIN_SPLIT, seq_len - 1]


def make_cache(runner, rng, case: Case) -> PagedCache:
    return PagedCache(
        runner,
        rng,
        case.seq_lens,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
        block_size=case.block_size,
    )


def make_query(rng, case: Case, cache: PagedCache) -> np.ndarray:
    """[num_seqs, num_heads, head_dim]"""
    return np.stack([pointed_query(rng, keys, spots(len(keys), case.window), case.group) for keys in cache.keys])


def make_workspace(runner, case: Case, num_seqs: int | None = None, max_seq_len: int | None = None):
    num_seqs, max_seq_len = num_seqs or len(case.seq_lens), max_seq_len or max(case.seq_lens)
    size = decode_workspace_size(num_seqs, case.num_heads, case.num_kv_heads, case.head_dim, max_seq_len)
    return runner.array(np.zeros(-(-size // 16) * 16, np.uint8))


def run(runner, case: Case, cache: PagedCache, query, workspace, /, seqs=None, **changes) -> np.ndarray:
    """out [num_seqs, num_heads * head_dim] of the sequences `seqs` (all) in that order, run as one batch."""
    seqs = list(range(len(case.seq_lens))) if seqs is None else seqs
    out = runner.array(poisoned((len(seqs), case.num_heads * case.head_dim), case.dtype))
    arguments = {
        "out": out,
        "qkv": runner.array(pack_qkv(query[seqs], case.num_kv_heads)),
        "arena": cache.arena,
        "layer": cache.layer,
        "block_tables": runner.array(runner.host(cache.block_tables)[seqs]),
        "seq_lens": runner.array(np.array(cache.seq_lens, np.int32)[seqs]),
        "workspace": workspace,
        "num_heads": case.num_heads,
        "num_decodes": len(seqs),
        "max_seq_len": max(cache.seq_lens[seq] for seq in seqs),
        "sm_scale": case.head_dim**-0.5,
        "window": case.window,
    }
    paged_decode(**{**arguments, **changes})
    return runner.host(out)


@pytest.mark.parametrize(("case", "kernels"), CASES_AND_KERNELS)
def test_matches_the_formula(runner, rng, case, kernels):
    cache = make_cache(runner, rng, case)
    query = make_query(rng, case, cache)

    out = run(runner, case, cache, query, make_workspace(runner, case), kernels=kernels)

    expected, bound = expected_of(case, cache, query)
    assert_close(out, expected, atol=bound)
    filled = np.array(case.seq_lens) > 0
    assert_teeth(expected[filled], bound[filled])


def expected_of(case: Case, cache: PagedCache, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(expected, bound on the error), both [num_seqs, num_heads * head_dim], for what the cache was filled with."""
    results = []
    for seq, seq_len in enumerate(case.seq_lens):
        first = max(0, seq_len - case.window) if case.window else 0
        results.append(
            attention_reference(
                query[seq], cache.keys[seq][first:], cache.values[seq][first:], sm_scale=case.head_dim**-0.5
            )
        )
    expected, bound = (np.stack(parts).reshape(len(query), -1) for parts in zip(*results, strict=True))
    return expected, bound


def newest_slots(cache: PagedCache) -> np.ndarray:
    """[num_seqs] where the last token of each sequence is, -1 where it has none."""
    return np.array([(cache.slots(seq)[-1:].tolist() or [-1])[0] for seq in range(len(cache.seq_lens))], np.int32)


def turned(heads: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """heads [num_seqs, num_heads, head_dim] after quarter turns cos, sin [num_seqs, head_dim / 2]: nothing rounds."""
    first, second = np.split(heads, 2, axis=-1)
    cos, sin = (part[:, None].astype(heads.dtype) for part in (cos, sin))
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@pytest.mark.sm90
@pytest.mark.parametrize(
    "case", [case for case in CASES if KERNELS_SM90[case.head_dim] is not KERNELS[case.head_dim]], ids=str
)
def test_rotates_and_stores_the_newest_keys_on_the_way(runner, rng, case):
    """The queries and the newest keys come a few quarter turns away from what the formula is given, the newest keys and
    values in qkv alone; afterwards the cache has them."""
    cache = make_cache(runner, rng, case)
    query = make_query(rng, case, cache)
    some = [seq for seq, seq_len in enumerate(case.seq_lens) if seq_len]
    positions = np.maximum(0, np.array(case.seq_lens) - 1)
    turns = rng.integers(0, 4, (positions.max() + 1, case.head_dim // 2))
    table = np.concatenate([np.array([1, 0, -1, 0])[turns], np.array([0, 1, 0, -1])[turns]], axis=1).astype(np.float32)
    cos, sin = np.split(table[positions], 2, axis=1)
    nothing = np.zeros((1, case.num_kv_heads, case.head_dim), case.dtype)
    keys, values = (
        np.stack([np.concatenate([nothing, rows])[-1] for rows in parts]) for parts in (cache.keys, cache.values)
    )
    slots = newest_slots(cache)
    cache.forget(slots[some])
    qkv = np.concatenate([turned(query, cos, -sin), turned(keys, cos, -sin), values], axis=1)

    out = run(
        runner,
        case,
        cache,
        query,
        make_workspace(runner, case),
        qkv=runner.array(qkv.reshape(len(qkv), -1)),
        rope=Rope(runner.array(table)),
        kernels=KERNELS_SM90,
    )

    expected, bound = expected_of(case, cache, query)
    assert_close(out, expected, atol=bound)
    stored_keys, stored_values = cache.read(slots[some])
    assert np.array_equal(stored_keys, keys[some])
    assert np.array_equal(stored_values, values[some])
    assert cache.unused_is_poison(np.concatenate([cache.slots(seq) for seq in some]))


@pytest.mark.sm90
@pytest.mark.parametrize(
    ("case", "norm", "rotary_dim"),
    [
        (Case(64, 16, 3, 3, (300, 0, 17, 64)), True, 64),
        (Case(64, 8, 1, 17, (9, 256), dtype=FLOAT16), False, 16),
        (Case(128, 16, 2, 4, (1500, 3, 257), window=300), True, 96),
        (Case(128, 32, 1, 16, (70,), dtype=FLOAT16), True, 128),
        (Case(128, 64, 4, 1, (65, 1)), False, 128),
    ],
    ids=str,
)
def test_rotating_on_the_way_is_the_same_to_the_bit(runner, rng, case, norm, rotary_dim):
    """...as rope_and_store_kv before."""
    total_heads = case.num_heads + 2 * case.num_kv_heads
    qkv = rng.standard_normal((len(case.seq_lens), total_heads * case.head_dim)).astype(case.dtype)
    angles = rng.uniform(-7, 7, (max(case.seq_lens), rotary_dim // 2))
    table = runner.array(np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    weights = (1 + rng.standard_normal((2, case.head_dim))).astype(case.dtype)
    rope = Rope(table, *(runner.array(weight) if norm else None for weight in weights), eps=1e-6)
    seed = rng.integers(1 << 30)

    outs, caches = [], []
    for on_the_way in (False, True):
        cache = make_cache(runner, np.random.default_rng(seed), case)
        slots = newest_slots(cache)
        cache.forget(slots[slots >= 0])
        given = runner.array(qkv)
        if not on_the_way:
            positions = np.maximum(0, np.array(case.seq_lens, np.int32) - 1)
            where = runner.array(positions), runner.array(slots)
            rope_and_store_kv(given, cache.arena, cache.layer, *where, rope.cos_sin, case.num_heads, *rope[1:])
        out = run(
            runner,
            case,
            cache,
            np.empty((len(qkv), case.num_heads, case.head_dim), case.dtype),
            make_workspace(runner, case),
            qkv=given,
            rope=rope if on_the_way else None,
            kernels=KERNELS_SM90,
        )
        if on_the_way:
            assert runner.host(given).tobytes() == qkv.tobytes()
        outs.append(out)
        caches.append(b"".join(runner.host(slab).tobytes() for slab in cache.arena.slabs))

    assert outs[1].tobytes() == outs[0].tobytes()
    assert caches[1] == caches[0]


@pytest.mark.parametrize(
    ("kernels", "change", "message"),
    [
        (KERNELS, {}, "^rope: paged_decode.cu takes queries and keys that are rotated"),
        (KERNELS_SM90, {"num_decodes": 1}, "^rope: all 2 tokens must decode; got 1"),
        (KERNELS_SM90, {"rope": Rope(np.zeros((300, 80), np.float32))}, "^cos_sin: rotary_dim .* up to head_dim 64"),
    ],
    ids=["portable", "others", "rotary_dim"],
)
def test_refuses_to_rotate(runner, rng, kernels, change, message):
    cache = make_cache(runner, rng, GOOD)
    rope = {"rope": Rope(np.zeros((300, 64), np.float32))}
    query = make_query(rng, GOOD, cache)
    with pytest.raises(ValueError, match=message):
        run(runner, GOOD, cache, query, make_workspace(runner, GOOD), **rope | change, kernels=kernels)


@in_both_tiers
@pytest.mark.parametrize("window", [0, 333])
def test_a_sequence_gives_the_same_bits_in_any_batch(runner, rng, window, kernels):
    case = Case(64, 16, 2, 4, (1000, 0, 77, 1400, 256), window)
    cache = make_cache(runner, rng, case)
    query = make_query(rng, case, cache)
    workspace = make_workspace(runner, case)

    together = run(runner, case, cache, query, workspace, kernels=kernels)
    backwards = run(runner, case, cache, query, workspace, seqs=[4, 3, 2, 1, 0], kernels=kernels)
    long_batch = run(
        runner,
        case,
        cache,
        query,
        make_workspace(runner, case, 5, 5000),
        block_tables=wide_tables(runner, cache),
        max_seq_len=5000,
        kernels=kernels,
    )

    assert backwards[::-1].tobytes() == together.tobytes()
    assert long_batch.tobytes() == together.tobytes()
    for seq in range(len(case.seq_lens)):
        alone = run(runner, case, cache, query, workspace, seqs=[seq], kernels=kernels)
        assert alone.tobytes() == together[seq].tobytes(), seq


def wide_tables(runner, cache: PagedCache):
    """The block tables with room for 5000 tokens."""
    tables = runner.host(cache.block_tables)
    return runner.array(np.pad(tables, ((0, 0), (0, 5000 // 8)), constant_values=0x7FFFFFFF))


@in_both_tiers
def test_launches_share_a_workspace(runner, rng, kernels):
    """Small batches and large ones in turn: what one leaves in the workspace suits the next."""
    case = Case(64, 16, 2, 4, (600, 300, 900))
    cache = make_cache(runner, rng, case)
    query = make_query(rng, case, cache)
    fresh = run(runner, case, cache, query, make_workspace(runner, case), kernels=kernels)
    shared = make_workspace(runner, case, num_seqs=8)

    for seqs in ([0, 1, 2], [2], [1, 0], [2], [0, 1, 2]):
        out = run(runner, case, cache, query, shared, seqs, kernels=kernels)
        assert out.tobytes() == fresh[seqs].tobytes()


@in_both_tiers
def test_leaves_the_other_sequences_alone(runner, rng, kernels):
    case = Case(64, 16, 1, 4, (300, 20, 50))
    cache = make_cache(runner, rng, case)
    query = make_query(rng, case, cache)
    alone = run(runner, case, cache, query, make_workspace(runner, case), seqs=[0, 1], kernels=kernels)

    out = run(runner, case, cache, query, make_workspace(runner, case), num_decodes=2, kernels=kernels)

    assert out[:2].tobytes() == alone.tobytes()
    assert is_poison(out[2]).all()


@in_both_tiers
def test_scores_that_overflow_without_the_maximum(runner, rng, kernels):
    """Scores in the thousands: 2^score is far beyond float32, the softmax isn't."""
    case = Case(64, 16, 1, 4, (300,))
    cache = make_cache(runner, rng, case)
    query = (40 * make_query(rng, case, cache).astype(np.float32)).astype(case.dtype)

    out = run(runner, case, cache, query, make_workspace(runner, case), kernels=kernels)

    expected, bound = attention_reference(query[0], cache.keys[0], cache.values[0], sm_scale=case.head_dim**-0.5)
    assert_close(out, expected.reshape(out.shape), atol=bound.reshape(out.shape))


def test_addresses_beyond_2_31_elements(runner, rng, tmp_path):
    """One slab with 2^32 elements of keys and as many of values, and a block at its very end."""
    layout = KVLayout(1, 8, 64, 256, BFLOAT16, blocks_per_slab=1 << 15)
    slab = huge_array(runner, tmp_path, layout.slab_shape, layout.dtype)
    slab_table = runner.array(np.array([runner.address(slab)], np.uint64))
    keys, values = rng.standard_normal((2, 33, 8, 256)).astype(BFLOAT16)
    block_id = layout.blocks_per_slab - 1
    for part, rows in enumerate((keys, values)):
        block = np.full((8, 64, 256), np.nan, BFLOAT16)
        block[:, :33] = rows.transpose(1, 0, 2)
        runner.copy_in(slab[0, part, block_id], stored_rows(block))
    case = Case(256, 64, 8, 1, (33,))
    query = pointed_query(rng, keys, [0, 32], 1)[None]
    out = runner.array(poisoned((1, 8 * 256), BFLOAT16))

    paged_decode(
        out,
        runner.array(pack_qkv(query, 8)),
        SimpleNamespace(layout=layout, slab_table_address=runner.address(slab_table)),
        0,
        runner.array(np.array([[block_id]], np.int32)),
        runner.array(np.array([33], np.int32)),
        make_workspace(runner, case),
        num_heads=8,
        num_decodes=1,
        max_seq_len=33,
        sm_scale=256**-0.5,
    )

    expected, bound = attention_reference(query[0], keys, values, sm_scale=256**-0.5)
    assert_close(runner.host(out), expected.reshape(1, -1), atol=bound.reshape(1, -1))


def huge_array(runner, folder, shape: tuple[int, ...], dtype: np.dtype):
    """An uninitialised array of which a test touches little; on the host a file with holes, larger than the memory."""
    if isinstance(runner, HostRunner):
        array = np.memmap(folder / "array", dtype, "w+", shape=shape)
        runner.loader.allow(array)
        return array
    import cupy

    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if cupy.cuda.runtime.memGetInfo()[0] < num_bytes + (1 << 30):
        pytest.skip(f"needs a GPU with {(num_bytes >> 30) + 1} GiB of free memory")
    return cupy.empty(shape, dtype)


def test_no_decodes_launch_nothing(runner, rng):
    case = Case(64, 16, 1, 4, (20,))
    cache = make_cache(runner, rng, case)
    out = run(runner, case, cache, make_query(rng, case, cache), make_workspace(runner, case), num_decodes=0)
    assert is_poison(out).all()


GOOD = Case(64, 16, 2, 4, (300, 20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": np.zeros((2, 511), BFLOAT16)}, r"^out: expected shape \(2, 512\)"),
        ({"out": np.zeros((2, 512), FLOAT16)}, "^out: .* got .* float16"),
        ({"qkv": np.zeros((2, 769), BFLOAT16)}, r"^qkv: expected shape \(2, 768\)"),
        ({"qkv": np.zeros((2, 768), np.float32)}, "^qkv: dtype must be bfloat16 or float16"),
        ({"qkv": np.zeros((2, 768), FLOAT16)}, "^qkv: the cache has dtype bfloat16"),
        ({"qkv": np.zeros((768, 2), BFLOAT16).T}, "^qkv: .* not C-contiguous"),
        ({"block_tables": np.zeros((2, 20), np.int64)}, "^block_tables: .* int32"),
        ({"block_tables": np.zeros((3, 20), np.int32)}, r"^block_tables: expected shape \(2, any\)"),
        ({"block_tables": np.zeros((2, 18), np.int32)}, r"^max_seq_len: block_tables \(2, 18\) hold 288 tokens"),
        ({"seq_lens": np.zeros((2,), np.int64)}, "^seq_lens: .* int32"),
        ({"workspace": np.zeros(16, np.uint8)}, "^workspace: expected 8464 bytes or more"),
        ({"workspace": np.zeros(100001, np.uint8)}, "^workspace: .* in whole 16s"),
        ({"workspace": np.zeros(100000, np.float32)}, "^workspace: .* uint8"),
        ({"num_heads": 7}, "^num_heads: expected a multiple of the cache's 2 kv heads; got 7"),
        ({"num_heads": 0}, "^num_heads: "),
        ({"num_decodes": 3}, "^num_decodes: expected 0 to 2"),
        ({"num_decodes": -1}, "^num_decodes: "),
        ({"max_seq_len": -1}, "^max_seq_len: "),
        ({"layer": 2}, "^layer: the cache has 2; got 2"),
        ({"sm_scale": 0.0}, "^sm_scale: expected a positive number"),
        ({"sm_scale": float("nan")}, "^sm_scale: expected a positive number"),
        ({"window": -1}, "^window: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_what_does_not_fit(runner, rng, change, message):
    cache = make_cache(runner, rng, GOOD)
    query = make_query(rng, GOOD, cache)
    with pytest.raises(ValueError, match=message):
        run(runner, GOOD, cache, query, make_workspace(runner, GOOD), **change)


@pytest.mark.parametrize(("head_dim", "block_size"), [(72, 16), (64, 24)])
def test_refuses_a_cache_of_another_geometry(runner, rng, head_dim, block_size):
    case = replace(GOOD, head_dim=head_dim, block_size=block_size)
    cache = make_cache(runner, rng, case)
    with pytest.raises(
        ValueError, match="head_dim: expected 64 or 80" if head_dim == 72 else "block_size: expected 8 or"
    ):
        run(runner, case, cache, make_query(rng, case, cache), make_workspace(runner, case))


def test_the_workspace_stays_bounded():
    assert decode_workspace_size(256, 32, 8, 128, 131072) < 80e6
    assert decode_workspace_size(256, 32, 8, 128, 131072) == decode_workspace_size(256, 32, 8, 128, 10**7)
    assert decode_workspace_size(1, 32, 8, 128, MIN_SPLIT) < 20e3
    assert [max_splits(num_kv_heads) for num_kv_heads in (1, 3, 4, 8, 32, 128, 1000)] == [32, 32, 32, 16, 4, 1, 1]


def test_every_instantiation_is_tried():
    cases = [param.values for param in CASES_AND_KERNELS]
    tried = {kernels[case.head_dim](case.dtype, case.head_dim, case.group) for case, kernels in cases}
    tried = {(kernel.file, name) for kernel in tried for name in (kernel.name, kernel.merge_name) if name}
    modules = (paged_decode_module, paged_decode_sm90_module)
    assert tried == {pair for module in modules for pair in module.instantiations()}
    assert {case.block_size for case in CASES} == {8, 16, 32, 64}
