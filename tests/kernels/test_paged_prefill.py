"""paged_prefill.cu and paged_prefill_sm90.cu against attention in float64, over a shuffled, NaN-poisoned cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from attention_tools import assert_teeth, attention_reference, both_tiers, pack_qkv, pointed_query, with_kernels
from cupaged.engine.step_graphs import StepGraphs, _Shape
from cupaged.kernels import paged_prefill as paged_prefill_module
from cupaged.kernels import paged_prefill_sm90 as paged_prefill_sm90_module
from cupaged.kernels.checks import BFLOAT16, FLOAT16, ceil_div
from cupaged.kernels.paged_prefill import KERNELS, _shares, paged_prefill, prefill_workspace_size
from cupaged.kernels.paged_prefill_sm90 import KERNELS_SM90
from kernel_tools import PagedCache, assert_close, is_poison, poisoned


@dataclass(frozen=True)
class Case:
    head_dim: int
    block_size: int
    num_kv_heads: int
    group: int  # query heads a kv head
    lens: tuple[tuple[int, int], ...]  # (query_len, seq_len) of each sequence
    window: int = 0
    dtype: np.dtype = BFLOAT16

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def query_start_loc(self) -> np.ndarray:
        return np.cumsum([0] + [query_len for query_len, _ in self.lens]).astype(np.int32)

    def __str__(self) -> str:
        lens = "_".join(f"{query_len}of{seq_len}" for query_len, seq_len in self.lens)
        return (
            f"d{self.head_dim}-b{self.block_size}-{self.num_kv_heads}x{self.group}-w{self.window}-{self.dtype}-{lens}"
        )


# A tile has 128 rows (64 at head_dim 256), a row being a (token, head of the group), and 64 keys. In the kernels for
# Hopper it has 128 keys, and its warpgroups 64 rows each.
CASES = [
    # whole prompts around the edges of blocks, key tiles and row tiles
    Case(64, 8, 2, 1, ((1, 1), (7, 7), (8, 8), (9, 9))),
    Case(64, 16, 1, 1, ((15, 15), (16, 16), (17, 17), (63, 63), (64, 64), (65, 65))),
    Case(64, 32, 2, 1, ((127, 127), (128, 128), (129, 129))),
    Case(64, 64, 1, 1, ((300, 300),)),
    # chunks: the first, in the middle, the last; of one token; mixed lengths; an empty query between others
    Case(64, 16, 1, 4, ((33, 33), (33, 97), (1, 1), (1, 77), (40, 104))),
    Case(64, 16, 3, 3, ((2, 130), (0, 20), (64, 64), (0, 0), (5, 260))),
    # head sizes, each with both types
    *(
        Case(head_dim, block_size, 1, group, ((40, 70), (1, 33), (75, 75)), dtype=dtype)
        for head_dim, block_size, group in [(80, 16, 7), (96, 8, 4), (128, 32, 8), (256, 16, 2)]
        for dtype in (BFLOAT16, FLOAT16)
    ),
    Case(64, 64, 1, 4, ((40, 140),), dtype=FLOAT16),
    # heads: tiles that end within a token's group, groups larger than a tile
    Case(64, 16, 2, 7, ((50, 90),)),
    Case(64, 16, 1, 16, ((20, 40),)),
    Case(64, 16, 1, 131, ((3, 70),)),
    # many sequences, most of which have fewer tiles of rows than one of them
    Case(64, 16, 1, 1, (*((2, 20),) * 21, (0, 5), (140, 140), *((1, 9),) * 20)),
    # many keys
    Case(64, 16, 1, 2, ((70, 1100),)),
    Case(128, 64, 1, 4, ((9, 1029), (1, 500))),
    # windows: one token, prime to blocks and tiles, of a key tile's length, longer than the chunk, than the sequence
    Case(64, 16, 1, 2, ((90, 90), (5, 200)), window=1),
    Case(64, 16, 2, 3, ((60, 130), (150, 150)), window=13),
    Case(128, 8, 1, 1, ((130, 300),), window=64),
    # and windows that begin at the last key of a tile for a warp's first row, at the second for a warp's last row
    *(Case(64, 16, 1, 1, ((64, 192),), window=window) for window in (95, 98, 127)),
    Case(64, 32, 1, 4, ((40, 333), (2, 101)), window=101, dtype=FLOAT16),
    Case(256, 16, 1, 1, ((70, 150),), window=45),
    Case(80, 16, 1, 2, ((50, 80),), window=1000),
]

CASES_AND_KERNELS = with_kernels(CASES, KERNELS, KERNELS_SM90)
in_both_tiers = both_tiers(KERNELS, KERNELS_SM90)


def make_cache(runner, rng, case: Case) -> PagedCache:
    return PagedCache(
        runner,
        rng,
        [seq_len for _, seq_len in case.lens],
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
        block_size=case.block_size,
    )


def first_key(position: int, window: int) -> int:
    return max(0, position - window + 1) if window else 0


def make_query(rng, case: Case, cache: PagedCache) -> np.ndarray:
    """[num_tokens, num_heads, head_dim], drawn to the token's own key, to the next one, which it must not see, and to
    both sides of the window's edge."""
    query = []
    for (query_len, seq_len), keys in zip(case.lens, cache.keys, strict=True):
        for position in range(seq_len - query_len, seq_len):
            edge = first_key(position, case.window)
            query.append(pointed_query(rng, keys, {edge - 1, edge, position, position + 1}, case.group))
    return np.stack(query)


def run(runner, case: Case, cache: PagedCache, query: np.ndarray, /, **changes) -> np.ndarray:
    """out [num_tokens, num_heads * head_dim]"""
    max_seq_len = max(changes.get("max_seq_len", 0), *(seq_len for _, seq_len in case.lens), 0)
    workspace_size = prefill_workspace_size(case.dtype, case.head_dim, case.num_kv_heads, max_seq_len)
    out = runner.array(poisoned((len(query), case.num_heads * case.head_dim), case.dtype))
    arguments = {
        "out": out,
        "qkv": runner.array(pack_qkv(query, case.num_kv_heads)),
        "arena": cache.arena,
        "layer": cache.layer,
        "block_tables": cache.block_tables,
        "seq_lens": runner.array(np.array(cache.seq_lens, np.int32)),
        "query_start_loc": runner.array(case.query_start_loc),
        "num_heads": case.num_heads,
        "num_decodes": 0,
        "workspace": runner.array(np.zeros(workspace_size, np.uint8)),
        "max_query_len": max(query_len for query_len, _ in case.lens),
        "max_seq_len": max(seq_len for _, seq_len in case.lens),
        "sm_scale": case.head_dim**-0.5,
        "window": case.window,
        "num_blocks": 3,
    }
    paged_prefill(**{**arguments, **changes})
    return runner.host(out)


def reference(case: Case, cache: PagedCache, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(expected, bound on the error), both [num_tokens, num_heads * head_dim]"""
    results = []
    for (query_len, seq_len), keys, values in zip(case.lens, cache.keys, cache.values, strict=True):
        for position in range(seq_len - query_len, seq_len):
            seen = slice(first_key(position, case.window), position + 1)
            results.append(
                attention_reference(query[len(results)], keys[seen], values[seen], sm_scale=case.head_dim**-0.5)
            )
    expected, bound = (np.stack(parts).reshape(len(query), -1) for parts in zip(*results, strict=True))
    return expected, bound


@pytest.mark.parametrize(("case", "kernels"), CASES_AND_KERNELS)
def test_matches_the_formula(runner, rng, case, kernels):
    cache = make_cache(runner, rng, case)
    query = make_query(rng, case, cache)

    out = run(runner, case, cache, query, kernels=kernels)

    expected, bound = reference(case, cache, query)
    assert_close(out, expected, atol=bound)
    assert_teeth(expected, bound)


# Over several splits of 4,096 keys each.
SPLIT_CASES = [
    # the second split has a handful of keys, and some rows see none of them; three splits, one, none
    Case(64, 16, 1, 4, ((9, 4101), (3, 8200), (0, 0), (2, 50), (1, 4096), (1, 4097))),
    Case(128, 32, 1, 3, ((45, 4130), (2, 4150))),  # two tiles of rows, of which the first sees one split
    Case(64, 8, 2, 1, ((5, 8195),), window=100),  # a row's window in one split, another's in two
    Case(256, 64, 1, 1, ((2, 4097),), dtype=FLOAT16),
]


@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
@pytest.mark.parametrize("num_parts", [6, 512])
def test_keys_are_split(runner, rng, case, num_parts):
    """In one launch or, with little room for parts, in several. The workspace is left as the next launch wants it."""
    cache = make_cache(runner, rng, case)
    query = make_query(rng, case, cache)
    size = prefill_workspace_size(case.dtype, case.head_dim, case.num_kv_heads, 8200)
    workspace = runner.array(np.zeros(size * num_parts // 512, np.uint8))
    outs = [run(runner, case, cache, query, workspace=workspace) for _ in range(2)]
    expected, bound = reference(case, cache, query)
    assert_close(outs[0], expected, atol=bound)
    assert outs[0].tobytes() == outs[1].tobytes()
    assert not runner.host(workspace)[-64:].any()  # counters


@pytest.mark.parametrize(("window", "group"), [(0, 4), (130, 1)])
def test_splits_change_no_bits_with_the_chunks_or_the_batch(runner, rng, window, group):
    case = Case(64, 16, 1, group, ((90, 4150),), window)
    cache = make_cache(runner, rng, case)
    query = make_query(rng, case, cache)
    whole = run(runner, case, cache, query)
    begin = 0
    for length in (1, 30, 3, 2, 1, 33, 20):  # the split lies at token 36
        chunk = replace(case, lens=((length, 4060 + begin + length),))
        seq_lens = runner.array(np.array([4060 + begin + length], np.int32))
        end = begin + length
        for max_seq_len in (4060 + end, 20_000):
            out = run(runner, chunk, cache, query[begin:end], seq_lens=seq_lens, max_seq_len=max_seq_len)
            assert out.tobytes() == whole[begin:end].tobytes(), (begin, end)
        begin = end
    assert begin == len(query)


@in_both_tiers
@pytest.mark.parametrize(("window", "group"), [(0, 3), (50, 1)])
def test_chunks_give_the_bits_of_the_whole_prompt(runner, rng, window, group, kernels):
    case = Case(64, 16, 1, group, ((150, 150),), window)
    cache = make_cache(runner, rng, case)
    query = make_query(rng, case, cache)
    whole = run(runner, case, cache, query, kernels=kernels)

    begin = 0
    for length in (1, 62, 3, 64, 20):
        end = begin + length
        chunk = replace(case, lens=((length, end),))
        seq_lens = runner.array(np.array([end], np.int32))
        out = run(runner, chunk, cache, query[begin:end], seq_lens=seq_lens, kernels=kernels)
        assert out.tobytes() == whole[begin:end].tobytes(), (begin, end)
        begin = end
    assert begin == len(query)


@in_both_tiers
def test_a_sequence_gives_the_same_bits_in_any_batch(runner, rng, kernels):
    case = Case(64, 16, 2, 2, ((30, 90), (100, 100), (7, 300)))
    cache = make_cache(runner, rng, case)
    query = make_query(rng, case, cache)
    together = run(runner, case, cache, query, max_query_len=500, kernels=kernels)

    for seq, (begin, end) in enumerate(zip(case.query_start_loc[:-1], case.query_start_loc[1:], strict=True)):
        alone = replace(case, lens=case.lens[seq : seq + 1])
        block_tables = runner.array(runner.host(cache.block_tables)[seq : seq + 1])
        seq_lens = runner.array(np.array(cache.seq_lens[seq : seq + 1], np.int32))
        changes = {"block_tables": block_tables, "seq_lens": seq_lens, "kernels": kernels}
        out = run(runner, alone, cache, query[begin:end], **changes)
        assert out.tobytes() == together[begin:end].tobytes(), seq


# Hopper's kernels with splits of so few keys that tests are quick.
SHORT_SPLITS = {
    head_dim: lambda dtype, head_dim: (kernel := KERNELS_SM90[head_dim](dtype, head_dim))._replace(
        name=kernel.name.replace(f"{kernel.split_keys}>", "256>"), split_keys=256
    )
    for head_dim in (64, 128)
}


def short_workspace(runner, case: Case):
    """Room for the splits of four tiles of rows and some."""
    return runner.array(np.zeros(2000 * (case.head_dim + 8) * 16, np.uint8))


# num_blocks: fewer than tiles of rows, which take all splits of one then, or enough for one to take one split
@pytest.mark.sm90
@pytest.mark.parametrize("num_blocks", [2, 20])
@pytest.mark.parametrize(
    "case",
    [
        Case(64, 16, 1, 4, ((40, 1000), (3, 257), (20, 20), (5, 256))),
        Case(64, 16, 2, 1, ((70, 600), (300, 300)), window=270),
        Case(128, 32, 1, 4, ((33, 700),), dtype=FLOAT16),
    ],
    ids=str,
)
def test_persistent_kernels_split_keys(runner, rng, case, num_blocks):
    cache = make_cache(runner, rng, case)
    query = make_query(rng, case, cache)
    workspace = short_workspace(runner, case)
    changes = {"kernels": SHORT_SPLITS, "num_blocks": num_blocks, "workspace": workspace}

    outs = [run(runner, case, cache, query, **changes) for _ in range(2)]

    expected, bound = reference(case, cache, query)
    assert_close(outs[0], expected, atol=bound)
    assert_teeth(expected, bound)
    assert outs[0].tobytes() == outs[1].tobytes()
    image_bytes = SHORT_SPLITS[case.head_dim](case.dtype, case.head_dim).image_bytes
    room = workspace.shape[0] // (image_bytes + 48)
    assert not runner.host(workspace)[-48 * room :].any()  # counters


@pytest.mark.sm90
@pytest.mark.parametrize("window", [0, 300])
def test_splits_give_the_same_bits_whoever_takes_them(runner, rng, window):
    case = Case(64, 16, 1, 2, ((300, 900),), window)
    cache = make_cache(runner, rng, case)
    query = make_query(rng, case, cache)
    common = {"kernels": SHORT_SPLITS, "workspace": short_workspace(runner, case)}
    whole = run(runner, case, cache, query, num_blocks=1, **common)

    for begin, end in ((0, 40), (40, 41), (41, 300)):
        chunk = replace(case, lens=((end - begin, 600 + end),))
        seq_lens = runner.array(np.array([600 + end], np.int32))
        out = run(runner, chunk, cache, query[begin:end], seq_lens=seq_lens, num_blocks=20, **common)
        assert out.tobytes() == whole[begin:end].tobytes(), (begin, end)


@in_both_tiers
def test_leaves_the_decodes_alone(runner, rng, kernels):
    case = Case(64, 16, 1, 4, ((1, 30), (1, 20), (50, 70), (3, 9)))
    cache = make_cache(runner, rng, case)
    query = make_query(rng, case, cache)

    out = run(runner, case, cache, query, num_decodes=2, kernels=kernels)

    assert is_poison(out[:2]).all()
    assert out[2:].tobytes() == run(runner, case, cache, query, kernels=kernels)[2:].tobytes()


@in_both_tiers
def test_tokens_of_an_empty_sequence_become_zeros(runner, rng, kernels):
    case = Case(64, 16, 1, 4, ((5, 30), (40, 0), (3, 9)))
    cache = make_cache(runner, rng, case)
    query = rng.standard_normal((48, case.num_heads, case.head_dim)).astype(case.dtype)

    out = run(runner, case, cache, query, kernels=kernels)

    assert not out[5:45].any()
    filled = np.r_[0:5, 45:48]
    expected, bound = reference(replace(case, lens=(case.lens[0], case.lens[2])), without(cache, 1), query[filled])
    assert_close(out[filled], expected, atol=bound)


def without(cache: PagedCache, seq: int) -> PagedCache:
    del cache.keys[seq], cache.values[seq]
    return cache


@in_both_tiers
def test_scores_that_overflow_without_the_maximum(runner, rng, kernels):
    """Scores in the thousands: 2^score is far beyond float32, the softmax isn't."""
    case = Case(64, 16, 1, 4, ((20, 150),))
    cache = make_cache(runner, rng, case)
    query = (40 * make_query(rng, case, cache).astype(np.float32)).astype(case.dtype)

    out = run(runner, case, cache, query, kernels=kernels)

    expected, bound = reference(case, cache, query)
    assert_close(out, expected, atol=bound)


def test_nothing_to_prefill_launches_nothing(runner, rng):
    case = Case(64, 16, 1, 4, ((1, 30), (1, 20)))
    cache = make_cache(runner, rng, case)
    query = make_query(rng, case, cache)
    assert is_poison(run(runner, case, cache, query, num_decodes=2)).all()
    assert is_poison(run(runner, case, cache, query, max_query_len=0)).all()


GOOD = Case(64, 16, 2, 4, ((2, 30), (1, 20)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": np.zeros((3, 511), BFLOAT16)}, r"^out: expected shape \(3, 512\)"),
        ({"qkv": np.zeros((3, 769), BFLOAT16)}, r"^qkv: expected shape \(3, 768\)"),
        ({"qkv": np.zeros((3, 768), FLOAT16)}, "^qkv: the cache has dtype bfloat16"),
        ({"block_tables": np.zeros((3, 20), np.int32)}, r"^block_tables: expected shape \(2, any\)"),
        ({"seq_lens": np.zeros((2, 1), np.int32)}, r"^seq_lens: expected shape \(any\)"),
        ({"query_start_loc": np.zeros(2, np.int32)}, r"^query_start_loc: expected shape \(3\)"),
        ({"query_start_loc": np.zeros(3, np.int64)}, "^query_start_loc: .* int32"),
        ({"num_heads": 7}, "^num_heads: expected a multiple of the cache's 2 kv heads; got 7"),
        ({"num_decodes": 3}, "^num_decodes: expected 0 to 2"),
        ({"max_query_len": -1}, "^max_query_len: expected 0 to 2097120; got -1"),
        ({"max_query_len": 2097121}, "^max_query_len: expected 0 to 2097120; got 2097121"),
        ({"layer": -1}, "^layer: the cache has 2; got -1"),
        ({"sm_scale": -1.0}, "^sm_scale: expected a positive number"),
        ({"window": -1}, "^window: "),
        ({"workspace": np.zeros(15, np.int32)}, "^workspace: .* uint8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_what_does_not_fit(runner, rng, change, message):
    cache = make_cache(runner, rng, GOOD)
    with pytest.raises(ValueError, match=message):
        run(runner, GOOD, cache, make_query(rng, GOOD, cache), **change)


def test_persistent_kernels_refuse_more_tiles_than_they_can_count(runner, rng):
    cache = make_cache(runner, rng, GOOD)
    sizes = {"seq_lens": (40_000,), "block_tables": (40_000, 1), "query_start_loc": (40_001,)}
    arrays = {name: runner.array(np.zeros(shape, np.int32)) for name, shape in sizes.items()}
    with pytest.raises(ValueError, match=r"^max_query_len: 40000 sequences of 2000000 tokens are too many"):
        run(
            runner, GOOD, cache, make_query(rng, GOOD, cache), **arrays,
            max_query_len=2_000_000, kernels=KERNELS_SM90,
        )  # fmt: skip


def test_refuses_another_head_dim(runner, rng):
    case = replace(GOOD, head_dim=72)
    cache = make_cache(runner, rng, case)
    with pytest.raises(ValueError, match=r"^head_dim: expected 64 or 80 or .*; the cache has 72"):
        run(runner, case, cache, make_query(rng, case, cache))


@pytest.mark.parametrize("length", [5000, 17000, 40000, 66000, 110000])
@pytest.mark.parametrize("query_lens", [[64], [100], [64, 64], [16, 16, 16]], ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(32, 8, 128), (32, 8, 64), (40, 8, 128)])
def test_small_steps_are_shared_out_when_padded_too(query_lens, length, num_heads, num_kv_heads, head_dim):
    """To as many thread blocks as without the padding of step_graphs.py."""
    sizes = {"max_num_seqs": 256, "max_model_len": 131072}
    graphs = StepGraphs(None, None, None, max_num_tokens=2048, **sizes)
    shape = _Shape(8 + sum(query_lens), 8, 8 + len(query_lens), 8, max(query_lens), length)
    kernel = KERNELS_SM90[head_dim](BFLOAT16, head_dim)
    workspace = np.empty(prefill_workspace_size(BFLOAT16, head_dim, num_kv_heads, 131072), np.uint8)

    def num_blocks(shape: _Shape) -> int:
        tiles = ceil_div(shape.max_query_len * (num_heads // num_kv_heads), kernel.num_rows)
        items = num_kv_heads * (shape.num_seqs - shape.num_decodes) * tiles
        return min(132, items * _shares(workspace, items, 132, shape.max_seq_len, kernel)[0])

    assert num_blocks(graphs._padded_shape(shape)) >= num_blocks(shape) >= 32


def test_every_instantiation_is_tried():
    cases = [param.values for param in CASES_AND_KERNELS]
    tried = {kernels[case.head_dim](case.dtype, case.head_dim)[:2] for case, kernels in cases}
    modules = (paged_prefill_module, paged_prefill_sm90_module)
    assert tried == {pair for module in modules for pair in module.instantiations()}
    assert {case.block_size for case in CASES} == {8, 16, 32, 64}
