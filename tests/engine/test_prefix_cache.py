"""Prompts that begin alike: computed once, never mixed up."""

import random
import time
from itertools import pairwise

import pytest
from fake_model import VOCAB_SIZE, audit, expected_output, make_engine, model_with, prompt_of, run_all

from cupaged.engine.block_pool import BlockPool
from cupaged.engine.prefix import PrefixBlock, PrefixHasher, PrefixKey
from cupaged.engine.sequence import Request
from cupaged.sampling_params import SamplingParams

BLOCK_SIZE = 8  # of make_engine


def greedy(max_tokens=4):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def ask(engine, prompt, max_tokens=4, **options):
    """The request's output, which must be right; (number of cached tokens, of computed ones)."""
    before = sum(sum(lens) for _, lens in engine.runner.decoder.batches)
    engine.add_request("ask", prompt, greedy(max_tokens), **options)
    output = run_all(engine)["ask"]
    assert output.outputs[0].token_ids == expected_output(prompt, max_tokens, ignore_eos=True)
    computed = sum(sum(lens) for _, lens in engine.runner.decoder.batches) - before
    assert computed == len(prompt) + max_tokens - 1 - output.num_cached_tokens
    return output.num_cached_tokens, computed


# -- hits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 100])
def test_classes_9_10_and_24_hit_or_miss_at_every_length(chunk):
    """Every prompt that begins with the first `common` tokens of another, common from none to all."""
    base = prompt_of(4 * BLOCK_SIZE + 3)
    for common in range(len(base) + 1):
        engine = make_engine(max_num_batched_tokens=chunk)
        assert ask(engine, base)[0] == 0
        prompt = base[:common] + [(token + 1) % VOCAB_SIZE for token in base[common:]]
        shared = common // BLOCK_SIZE * BLOCK_SIZE
        assert ask(engine, prompt)[0] == shared
        assert ask(engine, base[:common] or [1])[0] == max(0, common - 1) // BLOCK_SIZE * BLOCK_SIZE


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_classes_7_and_11_a_hit_never_covers_the_last_token(num_blocks, offset):
    prompt = prompt_of(num_blocks * BLOCK_SIZE + offset)
    engine = make_engine()
    assert ask(engine, prompt, max_tokens=1)[0] == 0
    cached, computed = ask(engine, prompt, max_tokens=1)
    assert cached == (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert computed == len(prompt) - cached >= 1


def test_outputs_are_found_too():
    engine = make_engine()
    prompt = prompt_of(10)
    ask(engine, prompt, max_tokens=20)
    turn = prompt + expected_output(prompt, 20, ignore_eos=True) + [1, 2, 3]
    assert ask(engine, turn)[0] == (10 + 20 - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_class_6_what_is_not_computed_yet_is_not_found_but_waited_for():
    engine = make_engine()
    prompt = prompt_of(20)
    for name in "abc":
        engine.add_request(name, prompt, greedy())
    engine.step()
    assert engine.runner.decoder.batches[-1] == (0, [20])
    engine.step()
    assert engine.runner.decoder.batches[-1] == (1, [1, 4, 4])
    outputs = run_all(engine)
    assert [outputs[name].num_cached_tokens for name in "abc"] == [0, 16, 16]
    for name in "abc":
        assert outputs[name].outputs[0].token_ids == expected_output(prompt, 4, ignore_eos=True)


@pytest.mark.parametrize("num_steps", range(4))
def test_class_6_the_one_that_is_waited_for_is_aborted(num_steps):
    engine = make_engine(max_num_batched_tokens=9)
    for name in "ab":
        engine.add_request(name, prompt_of(20), greedy())
    for _ in range(num_steps):
        engine.step()
        audit(engine)
    engine.abort("a")
    assert run_all(engine)["b"].outputs[0].token_ids == expected_output(prompt_of(20), 4, ignore_eos=True)


def test_a_failed_step_makes_nothing_findable():
    engine = make_engine()
    engine.add_request("a", prompt_of(20), greedy())
    engine.runner.decoder.fail = RuntimeError("a kernel failed")
    with pytest.raises(RuntimeError):
        engine.step()
    assert ask(engine, prompt_of(20))[0] == 0


def test_class_8_hits_shrink_while_a_request_waits_to_resume():
    """Preempted, its cached blocks evicted by others or not, resumed: at random."""
    rng = random.Random(4)
    for _ in range(30):
        engine = make_engine(num_blocks=10, max_model_len=60, max_num_batched_tokens=rng.choice([5, 16, 64]))
        prompts = [prompt_of(rng.randrange(1, 40), salt=rng.randrange(2)) for _ in range(6)]
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), prompt, greedy(12))
        last = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                last[output.request_id] = output
            audit(engine)
            if len(engine.scheduler.running) > 1 and rng.random() < 0.2:
                engine.scheduler.preempt(engine.scheduler.running[-1])
        for i, prompt in enumerate(prompts):
            assert last[str(i)].outputs[0].token_ids == expected_output(prompt, 12, ignore_eos=True)


# -- no false hits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digest_bytes", [0, 1])
def test_class_3_colliding_hashes_change_no_answer(digest_bytes):
    """A hash that is constant, and one with two values."""
    engine = make_engine(num_blocks=32)
    engine.hasher.hash_block = lambda parent, data: bytes([(sum(parent) + sum(data)) % 2][:digest_bytes])
    rng = random.Random(0)
    hits = 0
    for _ in range(40):
        same = [rng.randrange(2)] * BLOCK_SIZE
        other = [rng.randrange(2)] * BLOCK_SIZE
        prompt = [token for _ in range(rng.randrange(1, 4)) for token in rng.choice([same, other])] + [3]
        hits += ask(engine, prompt)[0] > 0
    assert 0 < hits < 40


def test_class_4_other_keys_share_nothing():
    engine = make_engine()
    prompt = prompt_of(20)
    ask(engine, prompt, cache_salt="a")
    assert ask(engine, prompt, cache_salt="b")[0] == 0
    assert ask(engine, prompt)[0] == 0
    assert ask(engine, prompt, cache_salt="a")[0] == 16
    assert ask(engine, prompt)[0] == 16
    other = make_engine(model=model_with(rms_norm_eps=1e-5))
    assert other._model_key != engine._model_key
    with pytest.raises(ValueError, match="cache_salt must be a string that is not empty"):
        engine.add_request("x", prompt, greedy(), cache_salt="")


def test_class_4_the_parts_of_a_key_are_told_apart():
    hasher = PrefixHasher(BLOCK_SIZE)

    def digest(*key):
        blocks = []
        hasher.extend(blocks, [1] * BLOCK_SIZE, PrefixKey(*key))
        return blocks[0].digest

    keys = [("m", "ab", "c"), ("m", "a", "bc"), ("m", None, "None"), ("m", "None", None), ("m", None, None), ("mm",)]
    assert len({digest(*key) for key in keys}) == len(keys)


def test_digests_do_not_depend_on_how_the_sequence_grew():
    hasher, key = PrefixHasher(BLOCK_SIZE), PrefixKey("m")
    tokens, whole, grown = prompt_of(50), [], []
    hasher.extend(whole, tokens, key)
    for length in range(51):
        hasher.extend(grown, tokens[:length], key)
    assert grown == whole
    assert len(whole) == 50 // BLOCK_SIZE
    assert all(block.parent_digest == parent.digest for parent, block in pairwise(whole))


def test_class_5_a_block_that_is_handed_out_anew_is_no_longer_found():
    engine = make_engine(num_blocks=8, preallocate=True)
    ask(engine, prompt_of(30, 0))
    assert ask(engine, prompt_of(30, 0))[0] == 24
    ask(engine, prompt_of(60, 1), max_tokens=2)  # takes all blocks
    assert engine.stats().num_evictions > 0
    assert ask(engine, prompt_of(30, 0))[0] == 0


def test_a_parent_that_was_computed_anew_is_not_the_parent_of_old_blocks():
    """The first of two blocks is evicted and computed again: the second is found again only once it is, too."""
    pool, key = BlockPool(lambda: 0), PrefixKey("m")
    pool.add_blocks(4)
    first, second = PrefixBlock(b"1", b"", b"one"), PrefixBlock(b"2", b"1", b"two")
    a, b = pool.allocate(2)
    serial = pool.register(a, first, key)
    assert pool.register(b, second, serial) != serial
    assert pool.find(second, serial).block_id == b
    pool.free([a])
    assert a in pool.allocate(3)
    assert pool.find(first, key) is None
    again = pool.register(a, first, key)
    assert pool.find(second, again) is None
    pool.register(a, second, again)
    assert pool.content(b) is None


def test_caching_can_be_switched_off():
    engine = make_engine(enable_prefix_caching=False)
    ask(engine, prompt_of(30))
    assert ask(engine, prompt_of(30))[0] == 0
    assert engine.stats().num_cached_blocks == 0


def test_reset_forgets_everything_that_runs_included():
    engine = make_engine()
    ask(engine, prompt_of(30, 1))
    engine.add_request("x", prompt_of(30), greedy(30))
    for _ in range(4):
        engine.step()
    engine.reset_prefix_cache()
    audit(engine)
    run_all(engine)
    assert engine.stats().num_cached_blocks == 0
    assert ask(engine, prompt_of(30))[0] == 0
    assert ask(engine, prompt_of(30, 1))[0] == 0
    assert ask(engine, prompt_of(30))[0] == 24


# -- eviction -----------------------------------------------------------------------------------------------


def test_class_17_the_least_recently_used_goes_first_and_tails_before_heads():
    engine = make_engine(num_blocks=8, preallocate=True)
    ask(engine, prompt_of(23, 0), max_tokens=2)  # 3 full blocks
    ask(engine, prompt_of(23, 1), max_tokens=2)  # 3 full blocks
    assert ask(engine, prompt_of(23, 0), max_tokens=2)[0] == 16  # is the more recent one now
    assert engine.stats().num_cached_blocks == 6
    ask(engine, prompt_of(23, 2), max_tokens=2)  # 3 blocks: two are free, so one is evicted: the tail of salt 1
    assert engine.stats().num_evictions == 1
    assert [num_findable_blocks(engine, prompt_of(23, salt)) for salt in range(3)] == [3, 2, 3]


def num_findable_blocks(engine, prompt):
    """Of the prompt and its output."""
    token_ids = prompt + expected_output(prompt, 9, ignore_eos=True)
    request = Request("?", None, token_ids, greedy(), 0, 0.0, prefix_key=PrefixKey(engine._model_key))
    return len(engine.blocks.find_prefix(request.sequences[0], len(token_ids)))


def test_free_blocks_then_new_ones_then_cached_ones_are_handed_out():
    grown = []
    pool = BlockPool(lambda: 2 if len(grown) < 1 and not grown.append(1) else 0)
    pool.add_blocks(3)
    a, b, _ = pool.allocate(3)
    pool.register(a, PrefixBlock(b"a", b"", b"a"), PrefixKey("m"))
    pool.free([a, b])
    assert pool.allocate(1) == [b]
    assert pool.allocate(2) == [3, 4]
    assert pool.num_evictions == 0
    assert pool.allocate(1) == [a]
    assert pool.num_evictions == 1
    assert pool.find(PrefixBlock(b"a", b"", b"a"), PrefixKey("m")) is None
    assert pool.allocate(1) is None


def test_class_17_a_hundred_thousand_cached_blocks_are_evicted_in_constant_time_each():
    def seconds_per_block(count):
        best = float("inf")
        for _ in range(3):
            pool = BlockPool(lambda: 0)
            pool.add_blocks(count)
            blocks, link = pool.allocate(count), PrefixKey("m")
            for block_id in blocks:
                name = str(block_id).encode()
                link = pool.register(block_id, PrefixBlock(name, b"", name), link)
            pool.free(reversed(blocks))
            start = time.perf_counter()
            assert [pool.allocate(1)[0] for _ in range(count)] == blocks[::-1]
            best = min(best, time.perf_counter() - start)
        return best / count

    assert seconds_per_block(100_000) < 10 * seconds_per_block(1_000)


def test_an_admission_does_not_evict_the_blocks_that_it_has_found():
    engine = make_engine(num_blocks=8, preallocate=True)
    ask(engine, prompt_of(30), max_tokens=2)
    assert ask(engine, prompt_of(30) + [1] * 33, max_tokens=1)[0] == 24
