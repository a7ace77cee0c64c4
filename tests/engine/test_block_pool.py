import random
import time

import pytest

from cupaged.engine.block_pool import Block, BlockPool, FreeQueue


def growing_pool(*slabs):
    """A pool whose cache can grow by these numbers of blocks."""
    left = list(slabs)
    return BlockPool(lambda: left.pop(0) if left else 0)


def test_blocks_are_handed_out_in_the_order_in_which_they_became_free():
    pool = growing_pool(4)
    assert pool.allocate(4) == [0, 1, 2, 3]
    pool.free([2])
    pool.free([0, 3])
    assert pool.allocate(3) == [2, 0, 3]


def test_the_pool_grows_by_whole_slabs_and_only_when_it_must():
    pool = growing_pool(4, 4, 4)
    assert pool.num_blocks == 0
    assert len(pool.allocate(3)) == 3
    assert (pool.num_blocks, pool.num_free_blocks) == (4, 1)
    assert len(pool.allocate(6)) == 6
    assert (pool.num_blocks, pool.num_free_blocks) == (12, 3)


def test_an_allocation_that_does_not_fit_takes_nothing():
    pool = growing_pool(4, 4)
    pool.allocate(3)
    assert pool.allocate(6) is None
    assert pool.num_free_blocks == 5
    assert pool.allocate(5) is not None
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []


def test_a_shared_block_is_free_when_its_last_holder_lets_go():
    pool = growing_pool(2)
    blocks = pool.allocate(2)
    pool.share(blocks)
    pool.free(blocks)
    assert pool.num_free_blocks == 0
    assert [pool.ref_count(b) for b in blocks] == [1, 1]
    pool.free(blocks)
    assert pool.num_free_blocks == 2


def test_class_19_freeing_twice_and_sharing_a_free_block_raise():
    pool = growing_pool(2)
    blocks = pool.allocate(2)
    pool.free(blocks)
    with pytest.raises(RuntimeError, match="block 0 is freed twice"):
        pool.free(blocks)
    with pytest.raises(RuntimeError, match="block 1 is shared, but it is free"):
        pool.share([1])
    assert pool.num_free_blocks == 2
    pool.allocate(1)
    with pytest.raises(RuntimeError, match="freed twice"):
        pool.free([0, 0])


def test_free_queue_against_a_list():
    rng = random.Random(0)
    queue, model = FreeQueue(), []
    outside = [Block(i) for i in range(20)]
    for _ in range(5000):
        kind = rng.choice(["append", "popleft", "remove"])
        if kind == "append" and outside:
            block = outside.pop(rng.randrange(len(outside)))
            queue.append(block)
            model.append(block)
        elif kind == "popleft" and model:
            block = queue.popleft()
            assert block is model.pop(0)
            outside.append(block)
        elif kind == "remove" and model:
            block = model.pop(rng.randrange(len(model)))
            queue.remove(block)
            outside.append(block)
        assert list(queue) == model
        assert len(queue) == len(model)


def test_pool_against_a_model():
    """Random allocations, shares and frees, by holders that remember what they hold."""
    rng = random.Random(1)
    pool, holders = growing_pool(8, 8, 8), []
    for _ in range(5000):
        kind = rng.choice(["allocate", "share", "free"])
        held = [b for blocks in holders for b in blocks]
        if kind == "allocate":
            count = rng.randrange(5)
            blocks = pool.allocate(count)
            assert (blocks is None) == (count > 24 - len(set(held)))
            if blocks is not None:
                assert not set(blocks) & set(held)
                holders.append(blocks)
        elif holders and kind == "share":
            blocks = rng.choice(holders)
            pool.share(blocks)
            holders.append(list(blocks))
        elif holders:
            pool.free(holders.pop(rng.randrange(len(holders))))
        held = [b for blocks in holders for b in blocks]
        assert [pool.ref_count(b) for b in range(pool.num_blocks)] == [held.count(b) for b in range(pool.num_blocks)]
        assert pool.num_free_blocks == pool.num_blocks - len(set(held))


def test_a_hundred_thousand_blocks_cost_as_much_each_as_a_thousand():
    def seconds_per_block(count):
        pool = growing_pool(count)
        pool.free(pool.allocate(count))  # the blocks exist
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            for block in [pool.allocate(1) for _ in range(count)]:
                pool.free(block)
            best = min(best, time.perf_counter() - start)
        return best / count

    assert seconds_per_block(100_000) < 10 * seconds_per_block(1_000)
