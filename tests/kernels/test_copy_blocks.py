"""copy_blocks.cu against indexing, byte by byte over whole arenas: what is not a destination stays as it was."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from cupaged.kernels.checks import BFLOAT16, FLOAT16, FLOAT32
from cupaged.kernels.copy_blocks import MAX_PAIRS, NUM_THREADS, NUM_VECTORS, copy_blocks
from cupaged.memory.arena import KVArena, KVLayout
from kernel_tools import FLOAT_DTYPES, is_poison

VECTORS_PER_THREAD_BLOCK = NUM_THREADS * NUM_VECTORS


def arena_of(runner, layout: KVLayout, num_slabs: int, allocate=None) -> KVArena:
    """An arena with all of its slabs, poisoned."""
    arena = KVArena(layout, runner, num_slabs * layout.blocks_per_slab, allocate)
    while arena.grow():
        pass
    assert len(arena.slabs) == num_slabs
    return arena


def fill(runner, arena: KVArena, rng) -> None:
    """Random bytes, NaN and all, in every block."""
    for slab in arena.slabs:
        values = rng.integers(0, 256, int(np.prod(slab.shape)) * slab.dtype.itemsize, np.uint8)
        runner.copy_in(slab, values.view(slab.dtype).reshape(slab.shape))


def blocks(runner, arena: KVArena) -> np.ndarray:
    """[num_blocks, num_layers, 2, bytes of a run]: what the arena holds."""
    slabs = np.concatenate([runner.host(slab) for slab in arena.slabs], axis=2)
    by_block = np.ascontiguousarray(np.moveaxis(slabs, 2, 0))
    return by_block.reshape(*by_block.shape[:3], -1).view(np.uint8)


@dataclass
class Case:
    run_vectors: int  # 16-byte vectors of a layer's keys of a block
    dtype: np.dtype
    num_layers: int = 3

    def layout(self, blocks_per_slab: int) -> KVLayout:
        """Heads are of 16 bytes, so that any number of vectors makes a run."""
        head_dim = 16 // self.dtype.itemsize
        return KVLayout(self.num_layers, self.run_vectors, 1, head_dim, self.dtype, blocks_per_slab)

    def __str__(self):
        return f"{self.num_layers}x{self.run_vectors}-{self.dtype}"


CASES = [
    *(Case(37, dtype) for dtype in FLOAT_DTYPES),
    Case(1, FLOAT16),
    Case(NUM_THREADS - 1, BFLOAT16),
    Case(NUM_THREADS + 1, FLOAT32, num_layers=1),
    Case(VECTORS_PER_THREAD_BLOCK - 1, BFLOAT16, num_layers=2),
    Case(VECTORS_PER_THREAD_BLOCK, FLOAT16, num_layers=1),
    Case(2 * VECTORS_PER_THREAD_BLOCK + 1, BFLOAT16, num_layers=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_copy_on_write_within_an_arena(case, runner, rng):
    arena = arena_of(runner, case.layout(4), num_slabs=3)
    fill(runner, arena, rng)
    before = blocks(runner, arena)
    order = rng.permutation(arena.num_blocks)
    pairs = np.array([[order[0], order[1]], [order[0], order[2]], *zip(order[3:6], order[6:9], strict=True)], np.int32)
    assert len({*pairs.reshape(-1) // 4}) > 1  # over slabs
    copy_blocks(arena, arena, pairs)

    expected = before.copy()
    for src, dst in pairs:
        expected[dst] = before[src]
    assert np.array_equal(blocks(runner, arena), expected)
    assert not np.array_equal(before, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("blocks_per_slab", "blocks_per_host_slab"), [(4, 4), (2, 8), (8, 1)])
def test_swapping_out_and_in(case, blocks_per_slab, blocks_per_host_slab, runner, rng):
    arena = arena_of(runner, case.layout(blocks_per_slab), 16 // blocks_per_slab)
    host = arena_of(runner, case.layout(blocks_per_host_slab), 16 // blocks_per_host_slab, runner.empty_host)
    fill(runner, arena, rng)
    before = blocks(runner, arena)
    swapped_out = np.stack([rng.permutation(16)[:5], rng.permutation(16)[:5]], axis=1).astype(np.int32)
    copy_blocks(host, arena, swapped_out)

    in_host = blocks(runner, host)
    untouched = np.ones(16, bool)
    for src, dst in swapped_out:
        assert np.array_equal(in_host[dst], before[src])
        untouched[dst] = False
    assert untouched.sum() == 11
    assert is_poison(in_host[untouched]).all()
    assert np.array_equal(blocks(runner, arena), before)

    swapped_in = np.stack([swapped_out[:, 1], rng.permutation(16)[:5]], axis=1).astype(np.int32)
    copy_blocks(arena, host, swapped_in)
    expected = before.copy()
    expected[swapped_in[:, 1]] = before[swapped_out[:, 0]]
    assert np.array_equal(blocks(runner, arena), expected)
    assert np.array_equal(blocks(runner, host), in_host)


@pytest.mark.parametrize("num_pairs", [MAX_PAIRS, MAX_PAIRS + 1, 2 * MAX_PAIRS + 3])
def test_more_pairs_than_a_launch_takes(num_pairs, runner, rng):
    arena = arena_of(runner, Case(1, FLOAT16, num_layers=1).layout(512), num_slabs=4)
    fill(runner, arena, rng)
    before = blocks(runner, arena)
    pairs = rng.permutation(2048)[: 2 * num_pairs].reshape(-1, 2).astype(np.int32)
    copy_blocks(arena, arena, pairs)
    expected = before.copy()
    expected[pairs[:, 1]] = before[pairs[:, 0]]
    assert np.array_equal(blocks(runner, arena), expected)


def test_more_than_2_to_31_elements(runner):
    """The last block's values begin 2^31 words, and more, behind the slab's first."""
    case = Case(run_vectors=4352, dtype=FLOAT32, num_layers=1)
    layout = case.layout(blocks_per_slab=1 << 16)
    arena = arena_of(runner, layout, 1, runner.zeros)
    [slab] = arena.slabs
    assert layout.offset(0, 1) + (layout.blocks_per_slab - 1) * 4352 * 4 > 2**31
    values = np.arange(1, 4352 * 4 + 1, dtype=np.float32).reshape(1, 4352, 1, 4)
    for part, value in enumerate((values, -values)):
        runner.copy_in(slab[0, part, -1:], value)
    copy_blocks(arena, arena, np.array([[layout.blocks_per_slab - 1, 2]], np.int32))
    for part, value in enumerate((values, -values)):
        first_blocks = runner.host(slab[0, part, :4])
        assert np.array_equal(first_blocks[2:3], value)
        assert not first_blocks[[0, 1, 3]].any()


def test_no_pairs_launch_nothing(runner):
    arena = arena_of(runner, Case(1, FLOAT16).layout(2), 1)
    copy_blocks(arena, arena, np.empty((0, 2), np.int32))


@pytest.mark.parametrize(
    ("changes", "pairs", "message"),
    [
        ({}, np.zeros((3, 2), np.int64), r"pairs: expected shape \(any, 2\) int32.* got \(3, 2\) int64"),
        ({}, np.zeros((2, 3), np.int32), r"pairs: expected shape \(any, 2\)"),
        ({}, np.zeros((2, 3), np.int32).T, r"pairs: .*not C-contiguous"),
        (
            {"num_layers": 4},
            np.zeros((1, 2), np.int32),
            "dst: its blocks must be laid out as src's; .*num_layers=4",
        ),
        ({"dtype": BFLOAT16}, np.zeros((1, 2), np.int32), "dst: its blocks must be laid out as src's"),
        ({"block_size": 2}, np.zeros((1, 2), np.int32), "dst: its blocks must be laid out as src's"),
    ],
)
def test_what_does_not_fit_is_named(changes, pairs, message, runner):
    layout = Case(1, FLOAT16).layout(2)
    src, dst = arena_of(runner, layout, 1), arena_of(runner, replace(layout, **changes), 1)
    with pytest.raises(ValueError, match=message):
        copy_blocks(dst, src, pairs)


def test_blocks_that_are_no_whole_vectors_are_refused(runner):
    arena = arena_of(runner, KVLayout(1, 1, 1, 12, FLOAT16, 2), 1)
    with pytest.raises(ValueError, match=r"^src: .* must be a multiple of 16 bytes; got 24"):
        copy_blocks(arena, arena, np.zeros((1, 2), np.int32))
