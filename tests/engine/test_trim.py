"""The cache shrinks as well as it grows, while requests run on; and closing gives everything back."""

import gc
import json
import random
import time
import tracemalloc
import weakref

import pytest
from fake_model import audit, expected_output, make_engine, preempt, prompt_of, run_all

from cupaged import LLM, SamplingParams
from cupaged.config import EngineConfig
from cupaged.engine.block_pool import BlockPool

BLOCK_SIZE = 8  # of make_engine
SLAB_BLOCKS = 8  # of an engine with 64 blocks
SLAB_BYTES = SLAB_BLOCKS * BLOCK_SIZE * 16


def greedy(max_tokens=20):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def slabs(engine):
    """The numbers of the slabs that have memory."""
    return [i for i, slab in enumerate(engine.arena.slabs) if slab is not None]


def test_idle_slabs_are_given_back_while_others_run_on():
    engine = make_engine(enable_prefix_caching=False)
    engine.add_request("short", prompt_of(60), greedy(2))  # slab 0
    engine.add_request("long", prompt_of(60, 1), greedy(40))  # slab 1, and later 0
    engine.add_request("wide", prompt_of(200, 2), greedy(2))  # slabs 2 to 5
    for _ in range(3):
        engine.step()
    [running] = engine.scheduler.running
    assert running.request_id == "long"
    assert slabs(engine) == [0, 1, 2, 3, 4, 5]
    memory = [weakref.ref(engine.arena.slabs[i]) for i in range(6)]

    assert engine.trim() == 4 * SLAB_BYTES + (0 if 0 in {b // 8 for b in running.active[0].block_table} else SLAB_BYTES)
    audit(engine)
    used = {block_id // SLAB_BLOCKS for block_id in running.active[0].block_table}
    assert set(slabs(engine)) == used < {0, 1}  # one slab of the first two
    assert {i for i in range(6) if memory[i]() is not None} == used
    assert engine.stats().num_slabs == len(used)
    assert engine.stats().kv_cache_bytes == len(used) * SLAB_BYTES
    assert engine.trim() == 0
    for i in range(6):  # no stale address
        assert engine.arena.slab_table[i] == (engine.arena.slabs[i].ctypes.data if i in used else 0)

    engine.add_request("again", prompt_of(200, 3), greedy(5))  # takes the free places
    outputs = run_all(engine)
    assert slabs(engine) == [0, 1, 2, 3, 4]
    for name, prompt, count in (("long", prompt_of(60, 1), 40), ("again", prompt_of(200, 3), 5)):
        assert outputs[name].outputs[0].token_ids == expected_output(prompt, count, ignore_eos=True)
    assert engine.trim() == 5 * SLAB_BYTES
    assert engine.stats().kv_cache_bytes == 0
    engine.add_request("more", prompt_of(20), greedy())
    assert run_all(engine)["more"].outputs[0].token_ids == expected_output(prompt_of(20), 20, ignore_eos=True)


def test_low_slabs_fill_first_so_that_high_ones_become_empty():
    """Requests come and go at random; then few are left. They are in the lowest slabs soon."""
    engine = make_engine(num_blocks=256, max_model_len=64, enable_prefix_caching=False)
    slab_blocks = engine.arena.layout.blocks_per_slab
    for i in range(40):
        engine.add_request(str(i), prompt_of(9, i), greedy(20 + i % 7))
    run_all(engine)
    assert len(slabs(engine)) > 4
    for i in range(6):
        engine.add_request(str(i), prompt_of(9, i), greedy(40))
    for _ in range(30):
        engine.step()
    used = {b // slab_blocks for request in engine.scheduler.running for b in request.active[0].block_table}
    assert used == set(range(-(-6 * 5 // slab_blocks)))
    engine.trim()
    audit(engine)
    assert set(slabs(engine)) == used
    run_all(engine)


def test_cached_blocks_in_idle_slabs_are_forgotten_and_those_in_use_stay():
    engine = make_engine()
    engine.add_request("a", prompt_of(64), greedy(2))
    run_all(engine)
    engine.add_request("b", prompt_of(64), greedy(30))  # finds the blocks of "a" in the first slab
    engine.step()
    assert engine.stats().num_cached_tokens == 56
    engine.add_request("c", prompt_of(100, 1), greedy(2))
    while len(engine.scheduler.running) + len(engine.scheduler.waiting) > 1:
        engine.step()
    cached = engine.stats().num_cached_blocks
    assert engine.trim() > 0
    audit(engine)
    assert engine.stats().num_cached_blocks < cached
    run_all(engine)
    engine.add_request("d", prompt_of(64), greedy(2))
    assert run_all(engine)["d"].num_cached_tokens == 56
    engine.trim()
    engine.add_request("e", prompt_of(64), greedy(2))
    assert run_all(engine)["e"].num_cached_tokens == 0


def test_the_swap_space_shrinks_too():
    engine = make_engine(preemption_mode="swap", swap_space_bytes=64 * 128)
    for i in range(2):
        engine.add_request(str(i), prompt_of(60 + i, i), greedy())
    engine.step()
    for _ in range(2):
        preempt(engine, engine.scheduler.running[-1])
    assert engine.stats().swap_space_bytes == 2 * SLAB_BYTES
    engine.abort("0")
    engine.trim()
    audit(engine)
    assert engine.stats().swap_space_bytes == SLAB_BYTES
    assert engine.stats().kv_cache_bytes == 0
    assert run_all(engine)["1"].outputs[0].token_ids == expected_output(prompt_of(61, 1), 20, ignore_eos=True)


def test_steps_give_back_what_was_idle_for_long(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    engine = make_engine(enable_prefix_caching=False, idle_trim_seconds=60)
    engine.add_request("wide", prompt_of(200), greedy(1))
    engine.step()
    assert len(slabs(engine)) == 4
    engine.add_request("long", prompt_of(9), greedy(100))
    for _ in range(59):
        now[0] += 1
        engine.step()
        assert len(slabs(engine)) == 4
    for _ in range(31):  # it looks twice in that time
        now[0] += 1
        engine.step()
    assert slabs(engine) == [0, 1]  # "long" has 100 tokens by now, in 13 blocks
    audit(engine)
    assert engine.has_request("long")


@pytest.mark.parametrize("config", [{"idle_trim_seconds": None}, {"idle_trim_seconds": 0, "preallocate": True}])
def test_steps_keep_what_they_are_told_to_keep(config):
    engine = make_engine(**config)
    engine.add_request("wide", prompt_of(200), greedy(1))
    run_all(engine)
    assert len(slabs(engine)) >= 4
    engine.trim()
    assert slabs(engine) == []


def test_trim_is_refused_within_a_step():
    engine = make_engine()
    engine.add_request("x", prompt_of(20), greedy())
    engine.runner.decoder.during_forward = engine.trim
    with pytest.raises(RuntimeError, match=r"trim\(\) was called from within a step"):
        engine.step()
    with pytest.raises(ValueError, match="idle_trim_seconds must be >= 0, or None; got -1"):
        EngineConfig(idle_trim_seconds=-1)


def test_a_slab_in_use_can_not_be_removed():
    engine = make_engine()
    engine.add_request("x", prompt_of(20), greedy())
    engine.step()
    with pytest.raises(RuntimeError, match="slab 0 is removed, but 3 of its blocks are in use"):
        engine.pool.remove_slab(0)
    assert engine.audit() == []


def test_an_interrupted_trim_leaves_the_books_in_order(monkeypatch):
    engine = make_engine()
    engine.add_request("x", prompt_of(200), greedy(1))
    run_all(engine)

    def interrupt(index):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.arena, "release", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.trim()
    monkeypatch.undo()
    audit(engine)
    engine.add_request("x", prompt_of(200), greedy(1))
    assert run_all(engine)["x"].outputs[0].token_ids == expected_output(prompt_of(200), 1, ignore_eos=True)
    engine.trim()
    assert engine.stats().kv_cache_bytes == 0


def test_pool_against_a_model_while_slabs_come_and_go():
    rng = random.Random(3)
    present, holders = set(), []

    def grow():
        missing = set(range(5)) - present
        if not missing or rng.random() < 0.2:
            return 0
        present.add(min(missing))
        return 4

    pool = BlockPool(grow)
    num_removed = 0
    for _ in range(5000):
        held = {b for blocks in holders for b in blocks}
        kind = rng.choice(["allocate", "free", "free", "remove"])
        if kind == "allocate":
            before = {b for slab in present for b in range(4 * slab, 4 * slab + 4)} - held
            blocks = pool.allocate(rng.randrange(1, 4))
            if blocks is not None:
                assert not set(blocks) & held
                holders.append(blocks)
                slabs = [b // 4 for b in blocks if b in before]
                assert slabs == sorted(slabs)  # the lowest first
                assert all(b // 4 >= slabs[-1] for b in before - set(blocks)) if slabs else True
        elif kind == "free" and holders:
            pool.free(holders.pop(rng.randrange(len(holders))))
        elif kind == "remove":
            idle = pool.idle_slabs(time.monotonic())
            assert idle == sorted(present - {b // 4 for b in held})
            for slab in idle[: rng.randrange(3)]:
                pool.remove_slab(slab)
                present.remove(slab)
                num_removed += 1
        held = {b for blocks in holders for b in blocks}
        everything = sorted(b for slab in present for b in range(4 * slab, 4 * slab + 4))
        assert pool.block_ids() == everything
        assert sorted(pool.unused_blocks()) == sorted(set(everything) - held)
        assert (pool.num_blocks, pool.num_free_blocks) == (len(everything), len(everything) - len(held))
        assert pool.idle_slabs(time.monotonic() - 100) == []
    assert num_removed > 100


# -- closing ------------------------------------------------------------------------------------------------


def test_closing_in_the_middle_gives_all_memory_back_at_once():
    engine = make_engine(preemption_mode="swap", swap_space_bytes=64 * 128)
    for i in range(3):
        engine.add_request(str(i), prompt_of(60 + i, i), greedy())
    engine.step()
    preempt(engine, engine.scheduler.running[-1])
    memory = [weakref.ref(slab) for slab in [*engine.arena.slabs, *engine.swap_arena.slabs]]
    memory += [weakref.ref(engine.arena.slab_table), weakref.ref(engine.runner.decoder)]
    assert len(memory) > 5
    gc.disable()
    try:
        engine.close()
        assert [ref() for ref in memory] == [None] * len(memory)
    finally:
        gc.enable()


def test_a_hundred_loads_do_not_grow(tmp_path):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    def cycle():
        with LLM(
            tmp_path / "config.json",
            device="cpu",
            load_format="dummy",
            max_num_batched_tokens=64,
            kv_cache_memory_bytes=1 << 20,
            preemption_mode="swap",
        ) as llm:
            llm.generate([[1, 2, 3], [4, 5, 6, 7]], SamplingParams(n=2, max_tokens=3, ignore_eos=True))

    for _ in range(5):  # caches fill
        cycle()
    gc.collect()
    tracemalloc.start()
    try:
        cycle()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(100):
            cycle()
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    # One load's arrays are half a megabyte; a hundred times as much as a byte a load is not noticed.
    assert grown < 100_000
