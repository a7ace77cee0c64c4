"""rope.cu against the formula in float64, over a cache whose unused slots are NaN."""

from dataclasses import dataclass

import numpy as np
import pytest

from cupaged.kernels.checks import BFLOAT16, FLOAT16, FLOAT32
from cupaged.kernels.rope import rope_and_store_kv
from cupaged.memory.arena import KVArena, KVLayout
from kernel_tools import SMALLEST_SUBNORMAL, UNIT_ROUNDOFF, PagedCache, assert_close, is_poison, plain_rows

EPS = 1e-6
MAX_POSITIONS = 9000


def cos_sin_table(rotary_dim):
    angles = np.arange(MAX_POSITIONS)[:, None] * 10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def reference(x, norm, positions, cos_sin):
    """(x [n, heads, head_dim] normed and rotated, sums of the magnitudes that were added), in float64."""
    x = x.astype(np.float64)
    if norm is not None:
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * norm.astype(np.float64)
    rotary_dim = cos_sin.shape[1]
    cos, sin = np.split(cos_sin[positions].astype(np.float64)[:, None], 2, axis=-1)
    first, second, rest = np.split(x, [rotary_dim // 2, rotary_dim], axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    magnitudes = [abs(first * cos) + abs(second * sin), abs(second * cos) + abs(first * sin), abs(rest)]
    return np.concatenate(rotated, axis=-1), np.concatenate(magnitudes, axis=-1)


@dataclass
class Case:
    head_dim: int
    block_size: int
    num_heads: int
    num_kv_heads: int
    dtype: np.dtype
    norm: bool = False
    rotary_dim: int = 0  # 0: head_dim
    seq_lens: tuple[int, ...] = (1, 19)

    def __str__(self):
        kind = f"{self.dtype}{'-norm' if self.norm else ''}"
        return f"{self.num_heads}/{self.num_kv_heads}x{self.head_dim}r{self.rotary_dim}-block{self.block_size}-{kind}"


CASES = [
    # every head_dim, block_size and group size; heads that fill a thread block, one less and one more
    Case(64, 16, 9, 3, BFLOAT16),
    Case(64, 8, 24, 4, FLOAT16, norm=True),  # 32 heads: one thread block
    Case(64, 32, 14, 2, BFLOAT16, norm=True),
    Case(80, 16, 7, 1, FLOAT16),
    Case(80, 64, 8, 4, BFLOAT16, norm=True),  # 16 heads: one thread block
    Case(96, 8, 8, 1, BFLOAT16),
    Case(96, 16, 4, 4, FLOAT16, norm=True),
    Case(128, 64, 32, 8, FLOAT16),  # 48 heads: three thread blocks
    Case(128, 16, 28, 4, BFLOAT16, norm=True),
    Case(128, 16, 1, 1, BFLOAT16, seq_lens=(1,)),
    Case(256, 32, 7, 1, BFLOAT16),  # 9 heads: one more than a thread block takes
    Case(256, 8, 8, 8, FLOAT16, norm=True),
    # rotary_dim below head_dim
    Case(64, 16, 9, 3, BFLOAT16, rotary_dim=16),
    Case(80, 64, 8, 4, BFLOAT16, norm=True, rotary_dim=32),
    Case(96, 8, 8, 1, BFLOAT16, rotary_dim=64),
    Case(128, 16, 28, 4, BFLOAT16, norm=True, rotary_dim=96),
    Case(256, 32, 7, 1, BFLOAT16, rotary_dim=240),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rope_and_store_kv_matches_the_formula(case, runner, rng):
    cache = PagedCache(
        runner,
        rng,
        case.seq_lens,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
        block_size=case.block_size,
        filled=False,
    )
    slots = rng.permutation(np.concatenate([cache.slots(seq) for seq in range(len(case.seq_lens))]))
    slot_mapping = np.concatenate([[-1], slots, [-1]]).astype(np.int32)  # the first and last token aren't stored
    num_tokens = len(slot_mapping)
    positions = rng.integers(0, MAX_POSITIONS, num_tokens, np.int32)
    positions[:2] = 0, MAX_POSITIONS - 1
    cos_sin = cos_sin_table(case.rotary_dim or case.head_dim)
    total_heads = case.num_heads + 2 * case.num_kv_heads
    heads = rng.standard_normal((num_tokens, total_heads, case.head_dim)).astype(case.dtype)
    heads[:, :, 0] = 30  # outliers at the edges of what is rotated
    heads[:, :, -1] = -25
    q_norm, k_norm = (1 + rng.standard_normal((2, case.head_dim))).astype(case.dtype) if case.norm else (None, None)

    qkv = runner.array(heads.reshape(num_tokens, -1))
    rope_and_store_kv(
        qkv,
        cache.arena,
        cache.layer,
        runner.array(positions),
        runner.array(slot_mapping),
        runner.array(cos_sin),
        case.num_heads,
        *(runner.array(norm) if case.norm else None for norm in (q_norm, k_norm)),
        eps=EPS,
    )

    q, k, v = np.split(heads, [case.num_heads, case.num_heads + case.num_kv_heads], axis=1)
    after = runner.host(qkv).reshape(heads.shape)
    stored_keys, stored_values = cache.read(slots)
    # One rounding to dtype; before it, relative to what is added, three in float32 for the rotation and, with a norm,
    # half of the head's additions (16 a lane, 4 across lanes) and some eight around them.
    float32_roundings = (3 + (20 / 2 + 8 if case.norm else 0)) * 2.0**-24
    for actual, x, norm, rows in (
        (after[:, : case.num_heads], q, q_norm, slice(None)),
        (stored_keys, k, k_norm, slice(1, -1)),
    ):
        expected, magnitude = reference(x[rows], norm, positions[rows], cos_sin)
        atol = SMALLEST_SUBNORMAL[case.dtype] + 2 * float32_roundings * magnitude
        assert_close(actual, expected, rtol=UNIT_ROUNDOFF[case.dtype], atol=atol)
    assert np.array_equal(stored_values, v[1:-1])
    assert np.array_equal(after[:, case.num_heads :], heads[:, case.num_heads :])  # keys and values in qkv: as given
    assert cache.unused_is_poison(slots)


def test_a_slab_of_more_than_2_to_31_elements(runner, rng):
    """The last slot of a slab whose keys alone are 2^31 elements: V begins past it."""
    layout = KVLayout(1, num_kv_heads=8, block_size=64, head_dim=256, dtype=BFLOAT16, blocks_per_slab=2**14)
    slab = runner.zeros(layout.slab_shape, BFLOAT16)

    class LazyMemory:  # the slab as it comes: 8 GiB of which a few pages are touched
        address = runner.address
        copy_in = runner.copy_in

        def empty(self, shape, dtype):
            return slab if shape == layout.slab_shape else runner.empty(shape, dtype)

    arena = KVArena(layout, LazyMemory(), layout.blocks_per_slab)
    assert arena.grow()
    heads = rng.standard_normal((1, 18, 256)).astype(BFLOAT16)
    rope_and_store_kv(
        runner.array(heads.reshape(1, -1)),
        arena,
        0,
        runner.array(np.zeros(1, np.int32)),
        runner.array(np.array([layout.blocks_per_slab * layout.block_size - 1], np.int32)),
        runner.array(cos_sin_table(256)),
        num_heads=2,
    )
    stored = plain_rows(runner.host(slab[0, :, -1]))[:, :, -1]  # position 0: nothing turns
    assert np.array_equal(stored, heads.reshape(18, 256)[2:].reshape(2, 8, 256))


def test_all_tokens_may_be_unstored(runner, rng):
    cache = PagedCache(runner, rng, [3], num_kv_heads=1, head_dim=64, dtype=FLOAT16, filled=False)
    qkv = runner.array(rng.standard_normal((2, 4 * 64)).astype(FLOAT16))
    positions, slots = runner.array(np.array([0, 0], np.int32)), runner.array(np.array([-1, -1], np.int32))
    rope_and_store_kv(qkv, cache.arena, 1, positions, slots, runner.array(cos_sin_table(64)), 2)
    assert cache.unused_is_poison(np.empty(0, np.int32))
    assert not is_poison(runner.host(qkv)).any()


class HostMemory:
    """Enough of a backend for an arena that no kernel touches."""

    def empty(self, shape, dtype):
        return np.empty(shape, dtype)

    def address(self, array):
        return array.ctypes.data


def arena_of(**changes):
    layout = {"num_layers": 2, "num_kv_heads": 2, "block_size": 16, "head_dim": 64, "dtype": FLOAT16}
    return KVArena(KVLayout(**layout | changes, blocks_per_slab=4), HostMemory(), 4)


def arguments(**changes):
    return {
        "qkv": np.zeros((3, 8 * 64), FLOAT16),
        "arena": arena_of(),
        "layer": 1,
        "positions": np.zeros(3, np.int32),
        "slot_mapping": np.zeros(3, np.int32),
        "cos_sin": np.zeros((10, 64), FLOAT32),
        "num_heads": 4,
    } | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": np.zeros((3, 8 * 64), FLOAT32)}, "qkv: dtype must be bfloat16 or float16; got float32"),
        ({"qkv": np.zeros((3, 8 * 64), BFLOAT16)}, r"qkv: expected shape \(any, 512\) float16.* got .* bfloat16"),
        ({"num_heads": 5}, r"qkv: expected shape \(any, 576\)"),
        ({"qkv": np.zeros((8 * 64, 3), FLOAT16).T}, "qkv: .*not C-contiguous"),
        ({"qkv": np.zeros(1600, FLOAT16)[1:1537].reshape(3, 512)}, "qkv: must start at a multiple of 16 bytes"),
        ({"positions": np.zeros(2, np.int32)}, r"positions: expected shape \(3\) int32"),
        ({"positions": np.zeros(3, np.int64)}, r"positions: expected .* int32.* got \(3,\) int64"),
        ({"slot_mapping": np.zeros(4, np.int32)}, r"slot_mapping: expected shape \(3\) int32"),
        ({"slot_mapping": np.zeros(3, np.int64)}, "slot_mapping: expected .* int32"),
        ({"cos_sin": np.zeros((10, 64), np.float64)}, "cos_sin: expected .* float32"),
        ({"cos_sin": np.zeros((10, 80), FLOAT32)}, "cos_sin: rotary_dim must be .* up to head_dim 64; got 80"),
        ({"cos_sin": np.zeros((10, 24), FLOAT32)}, "cos_sin: rotary_dim must be a multiple of 16.* got 24"),
        ({"cos_sin": np.zeros((10, 0), FLOAT32)}, "cos_sin: rotary_dim .* got 0"),
        ({"layer": 2}, "layer: must be 0 to 1; got 2"),
        ({"layer": -1}, "layer: must be 0 to 1; got -1"),
        ({"q_norm": np.zeros(64, FLOAT16)}, "q_norm, k_norm: give both or neither"),
        ({"q_norm": np.zeros(64, FLOAT32), "k_norm": np.zeros(64, FLOAT16)}, r"q_norm: expected shape \(64\) float16"),
        ({"q_norm": np.zeros(64, FLOAT16), "k_norm": np.zeros(32, FLOAT16)}, r"k_norm: expected shape \(64\) float16"),
        (
            {
                "arena": arena_of(head_dim=48),
                "qkv": np.zeros((3, 8 * 48), FLOAT16),
                "cos_sin": np.zeros((9, 48), FLOAT32),
            },
            r"arena: head_dim must be one of \(64, .*\); got 48",
        ),
        ({"arena": arena_of(block_size=12)}, r"arena: block_size must be one of \(8, .*\); got 12"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        rope_and_store_kv(**arguments(**changes))


def test_no_tokens_launch_nothing():
    nothing = np.empty(0, np.int32)
    rope_and_store_kv(**arguments(qkv=np.empty((0, 512), FLOAT16), positions=nothing, slot_mapping=nothing))
