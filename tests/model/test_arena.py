import numpy as np
import pytest

from cupaged.errors import OutOfMemoryError
from cupaged.memory.arena import TARGET_SLAB_BYTES, KVArena, KVLayout

SHAPE = {"num_layers": 3, "num_kv_heads": 2, "block_size": 16, "head_dim": 64, "dtype": np.dtype(np.float16)}
BYTES_PER_TOKEN = 3 * 2 * 2 * 64 * 2


class FullBackend:
    """Gives the first `left` arrays of a slab's size."""

    def __init__(self, backend, left):
        self.backend, self.left = backend, left

    def empty(self, shape, dtype):
        if len(shape) == 6:
            if self.left == 0:
                raise OutOfMemoryError("full")
            self.left -= 1
        return self.backend.empty(shape, dtype)

    def __getattr__(self, name):
        return getattr(self.backend, name)


def test_layout_counts_its_bytes():
    layout = KVLayout(**SHAPE, blocks_per_slab=8)
    assert layout.bytes_per_token == BYTES_PER_TOKEN
    assert layout.bytes_per_block == 16 * BYTES_PER_TOKEN
    assert layout.bytes_per_slab == np.empty(layout.slab_shape, np.float16).nbytes


def test_offset_is_where_the_slab_has_it():
    layout = KVLayout(**SHAPE, blocks_per_slab=8)
    slab = np.arange(np.prod(layout.slab_shape)).reshape(layout.slab_shape)
    for layer in range(3):
        for part in range(2):
            assert slab[layer, part].flat[0] == layout.offset(layer, part)


@pytest.mark.parametrize(("max_blocks", "expected"), [(1, 1), (15, 1), (16, 2), (100, 8), (10**9, None)])
def test_slabs_are_powers_of_two_of_at_most_an_eighth_of_the_cache(max_blocks, expected):
    layout = KVLayout.choose(**SHAPE, max_blocks=max_blocks)
    assert layout.blocks_per_slab == 1 << layout.slab_shift
    if expected is None:
        assert TARGET_SLAB_BYTES / 2 < layout.bytes_per_slab <= TARGET_SLAB_BYTES
    else:
        assert layout.blocks_per_slab == expected


def test_a_block_larger_than_a_slab_should_be_gets_one_of_its_own():
    layout = KVLayout.choose(
        num_layers=200, num_kv_heads=64, block_size=64, head_dim=256, dtype=np.float32, max_blocks=99
    )
    assert layout.bytes_per_block > TARGET_SLAB_BYTES
    assert layout.blocks_per_slab == 1


def test_growth_stops_at_whole_slabs_below_the_limit(backend):
    arena = KVArena(KVLayout(**SHAPE, blocks_per_slab=8), backend, max_blocks=31)
    assert arena.num_blocks == 0
    assert [arena.grow() for _ in range(5)] == [8, 8, 8, 0, 0]
    assert arena.num_blocks == 24


def test_the_table_holds_the_slabs_addresses_and_stays_in_place(backend):
    arena = KVArena(KVLayout(**SHAPE, blocks_per_slab=8), backend, max_blocks=24)
    address = arena.slab_table_address
    for number in range(1, 4):
        arena.grow()
        table = backend.to_host(arena.slab_table)
        assert table[:number].tolist() == [backend.address(slab) for slab in arena.slabs]
        assert backend.address(arena.slab_table) == arena.slab_table_address == address


def test_no_memory_is_a_full_cache(backend):
    arena = KVArena(KVLayout(**SHAPE, blocks_per_slab=8), FullBackend(backend, left=2), max_blocks=80)
    assert [arena.grow() for _ in range(4)] == [8, 8, 0, 0]
    assert arena.num_blocks == 16


def test_slabs_may_come_from_elsewhere(backend):
    taken = []

    def allocate(shape, dtype):
        if taken:
            raise OutOfMemoryError("full")
        taken.append(backend.empty_host(shape, dtype))
        return taken[-1]

    arena = KVArena(KVLayout(**SHAPE, blocks_per_slab=8), FullBackend(backend, left=0), 24, allocate)
    assert [arena.grow() for _ in range(2)] == [8, 0]
    assert arena.slabs[0] is taken[0]
    assert taken[0].shape == arena.layout.slab_shape
    assert backend.to_host(arena.slab_table)[0] == backend.address(taken[0])


def test_close_lets_the_slabs_go(backend):
    arena = KVArena(KVLayout(**SHAPE, blocks_per_slab=8), backend, max_blocks=8)
    arena.grow()
    arena.close()
    assert arena.num_blocks == 0
    assert arena.slab_table is None
