"""Several outputs of one prompt: forks, copies on write, and what happens to groups."""

import pytest
from fake_model import (
    EOS,
    audit,
    expected_output,
    expected_outputs,
    make_engine,
    model_with,
    params_of,
    prompt_of,
    run_all,
    tokens,
)

from cupaged.sampling_params import RequestOutputKind

BLOCK_SIZE = 8  # of make_engine


# -- copy-on-write ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remainder", range(BLOCK_SIZE))
@pytest.mark.parametrize("num_full", [1, 2])
def test_class_1_children_that_share_a_half_full_block_get_copies(num_full, remainder):
    prompt = prompt_of(num_full * BLOCK_SIZE + remainder)
    engine, params = make_engine(), params_of(3)
    engine.add_request("x", prompt, params)
    output = run_all(engine)["x"]
    assert tokens(output) == expected_outputs(prompt, params)
    assert engine.stats().num_copies == (2 if remainder else 0)
    assert engine.stats().num_used_blocks == 0


def test_class_2_the_last_sharer_writes_into_the_original():
    engine = make_engine()
    engine.add_request("x", prompt_of(12), params_of(3))
    engine.step()  # the prompt: blocks 0 (full) and 1 (half full), then the fork
    sequences = engine.scheduler.running[0].active
    full, half = sequences[0].block_table
    assert [seq.block_table for seq in sequences] == [[full, half]] * 3
    assert [engine.pool.ref_count(b) for b in (full, half)] == [3, 3]
    assert engine.stats().num_blocks_saved == 4
    engine.step()
    last_blocks = [seq.block_table[-1] for seq in sequences]
    assert last_blocks[-1] == half
    assert len(set(last_blocks)) == 3
    assert [engine.pool.ref_count(b) for b in (full, *last_blocks)] == [3, 1, 1, 1]
    assert engine.stats().num_copies == 2
    assert engine.stats().num_blocks_saved == 2
    run_all(engine)
    assert engine.stats().num_copies == 2


def test_the_prompt_is_computed_once_and_its_blocks_are_held_once():
    engine = make_engine(num_blocks=512, max_num_seqs=32, preallocate=True)
    engine.add_request("x", prompt_of(512), params_of(32, max_tokens=32))
    run_all(engine)
    assert sum(sum(lens) for _, lens in engine.runner.decoder.batches) == 512 + 31 * 32
    assert engine.stats().peak_used_blocks == 512 // BLOCK_SIZE + 32 * 4
    assert 0.5 < engine.stats().mean_sharing < 1


@pytest.mark.parametrize("chunk", [1, 3, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 100])
@pytest.mark.parametrize("caching", [False, True])
def test_n_outputs_are_those_of_n_requests_whatever_the_chunks(chunk, caching):
    engine = make_engine(max_num_batched_tokens=max(chunk, 4), enable_prefix_caching=caching)
    params, prompts = params_of(min(3, chunk)), [prompt_of(n, salt=n) for n in (1, 7, 8, 9, 30)]
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params)
    outputs = run_all(engine)
    for i, prompt in enumerate(prompts):
        assert tokens(outputs[str(i)]) == expected_outputs(prompt, params)


def test_children_end_one_by_one_and_give_back_what_is_theirs_alone():
    params = params_of(3, ignore_eos=False)
    prompts = [prompt_of(12, salt) for salt in range(200)]
    prompt = next(p for p in prompts if len({len(output) for output in expected_outputs(p, params)}) == 3)
    engine = make_engine()
    engine.add_request("x", prompt, params)
    output = run_all(engine)["x"]
    assert tokens(output) == expected_outputs(prompt, params)
    assert EOS in [t[-1] for t in tokens(output)]
    assert engine.stats().num_used_blocks == 0


# -- preemption ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(2, 7))
@pytest.mark.parametrize("caching", [False, True])
def test_class_12_groups_are_preempted_and_resumed_together(n, caching):
    params = params_of(n, max_tokens=18)
    prompts = [prompt_of(length, salt=length) for length in (3, 12, 16, 21)]
    engine = make_engine(num_blocks=2 + 4 * n, max_model_len=64, enable_prefix_caching=caching)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params)
    last = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            last[output.request_id] = output
        for request in engine.scheduler.waiting:
            assert all(not seq.block_table for seq in request.sequences)
        audit(engine)
    assert engine.stats().num_preemptions > 0
    for i, prompt in enumerate(prompts):
        assert tokens(last[str(i)]) == expected_outputs(prompt, params)


def test_a_preempted_group_shares_its_prompt_again():
    engine = make_engine(enable_prefix_caching=False)
    engine.add_request("x", prompt_of(20), params_of(3))
    for _ in range(6):
        engine.step()
    used = engine.stats().num_used_blocks
    engine.scheduler.preempt(engine.scheduler.running[0])
    assert engine.stats().num_used_blocks == 0
    engine.step()  # the prompt
    engine.step()  # each one's own output
    assert engine.stats().num_used_blocks == used
    assert sum(engine.runner.decoder.batches[-1][1]) == 3 * 6
    assert tokens(run_all(engine)["x"]) == expected_outputs(prompt_of(20), params_of(3))


@pytest.mark.parametrize("window", [None, 10])
def test_a_preempted_group_finds_its_outputs_in_the_cache(window):
    """Each its own full blocks, as far as they were not evicted; only what comes after them is computed again."""
    engine = make_engine(model=model_with(sliding_window=window))
    prompt, params = prompt_of(20), params_of(3, max_tokens=30)
    engine.add_request("x", prompt, params)
    for _ in range(15):
        engine.step()
    engine.scheduler.preempt(engine.scheduler.running[0])
    if window is None:
        lost = engine.pool._blocks[engine.pool.cached_blocks()[0]]  # a tail: the last full block of one output
        engine.pool._forget(lost)
    engine.step()
    assert engine.runner.decoder.batches[-1] == (0, [20 - 16])
    audit(engine)
    engine.step()
    assert sorted(engine.runner.decoder.batches[-1][1]) == ([3, 3, 3 + BLOCK_SIZE] if window is None else [3, 3, 3])
    assert tokens(run_all(engine)["x"]) == [
        expected_output(prompt, 30, seed=params.seed + i, ignore_eos=True, window=window) for i in range(3)
    ]


# -- abort and failure --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", range(9))
@pytest.mark.parametrize("index", [None, 0, 1, 2])
def test_class_18_abort_at_every_step_of_all_or_of_one_output(num_steps, index):
    """In its steps "x" waits, prefills in chunks, forks, decodes and is preempted."""
    engine = make_engine(num_blocks=12, max_num_batched_tokens=12)
    engine.add_request("a", prompt_of(9), params_of(2))
    engine.add_request("x", prompt_of(20, 1), params_of(3))
    engine.add_request("b", prompt_of(9, salt=2), params_of(1))
    for _ in range(num_steps):
        engine.step()
        audit(engine)
    output = engine.abort("x", index)
    audit(engine)
    outputs = run_all(engine)
    for name, prompt, n in (("a", prompt_of(9), 2), ("b", prompt_of(9, salt=2), 1)):
        assert tokens(outputs[name]) == expected_outputs(prompt, params_of(n))
    final = output if index is None else outputs["x"]
    for completion, wanted in zip(final.outputs, expected_outputs(prompt_of(20, 1), params_of(3)), strict=True):
        if index is None or completion.index == index:
            assert completion.finish_reason == "abort"
            assert completion.token_ids == wanted[: len(completion.token_ids)]
        else:
            assert completion.token_ids == wanted
    assert engine.stats().num_used_blocks == 0
    assert engine.abort("x") is None


def test_the_one_that_takes_over_a_prompt_caches_its_own_outputs():
    """The first output of a preempted group is aborted while it computes the prompt again. The block with the prompt's
    last token was to hold an output token of the first one; it holds the heir's."""
    prompt, params = prompt_of(31), params_of(2)
    engine = make_engine(max_num_batched_tokens=8)
    engine.add_request("x", prompt, params)
    for _ in range(6):
        engine.step()
    engine.scheduler.preempt(engine.scheduler.running[0])
    engine.reset_prefix_cache()
    engine.step()
    engine.abort("x", 0)
    audit(engine)
    _, wanted = expected_outputs(prompt, params)
    assert run_all(engine)["x"].outputs[1].token_ids == wanted
    engine.add_request("y", prompt + wanted[:9], params_of(1, seed=params.seed + 1))
    assert run_all(engine)["y"].num_cached_tokens == 32


def test_a_failing_step_of_a_group_leaks_nothing():
    for num_steps in range(5):
        engine = make_engine(max_num_batched_tokens=12)
        engine.add_request("x", prompt_of(20), params_of(3))
        for _ in range(num_steps):
            engine.step()
        engine.runner.decoder.fail = RuntimeError("a kernel failed")
        with pytest.raises(RuntimeError, match="a kernel failed"):
            engine.step()
        audit(engine)
        assert engine.stats().num_used_blocks == 0
        engine.add_request("x", prompt_of(20), params_of(3))
        assert tokens(run_all(engine)["x"]) == expected_outputs(prompt_of(20), params_of(3))


# -- outputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_class_35_each_output_keeps_its_index(kind):
    """Outputs that end at different steps."""
    prompt, params = next(
        (prompt, params)
        for salt in range(100)
        for prompt, params in [(prompt_of(12, salt), params_of(4, output_kind=kind, ignore_eos=False, max_tokens=30))]
        if len({len(t) for t in expected_outputs(prompt, params)}) == 4
    )
    engine = make_engine()
    engine.add_request("x", prompt, params)
    engine.add_request("y", prompt_of(4, 1), params_of(2, output_kind=kind))
    deltas = [[] for _ in range(4)]
    ends = [0] * 4
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.request_id != "x":
                continue
            indices = [completion.index for completion in output.outputs]
            assert indices == sorted(indices)
            if kind is not RequestOutputKind.DELTA:
                assert indices == [0, 1, 2, 3]
            for completion in output.outputs:
                if kind is RequestOutputKind.DELTA:
                    assert completion.token_ids
                    deltas[completion.index] += completion.token_ids
                    ends[completion.index] += completion.finish_reason is not None
                else:
                    assert completion.token_ids[: len(deltas[completion.index])] == deltas[completion.index]
                    deltas[completion.index] = completion.token_ids
            last = output
    assert deltas == expected_outputs(prompt, params)
    assert last.finished
    if kind is RequestOutputKind.DELTA:
        assert ends == [1] * 4


def test_best_of_returns_the_likeliest_first_at_the_end_only():
    engine, params = make_engine(), params_of(2, best_of=5, max_tokens=6, logprobs=0)
    engine.add_request("all", prompt_of(9), params_of(5, max_tokens=6, logprobs=0))
    every = sorted(run_all(engine)["all"].outputs, key=lambda c: -c.cumulative_logprob)
    assert every[0].cumulative_logprob > every[-1].cumulative_logprob
    engine.add_request("best", prompt_of(9), params)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    [output] = outputs
    assert [c.token_ids for c in output.outputs] == [c.token_ids for c in every[:2]]
    assert [c.index for c in output.outputs] == [0, 1]
    assert [c.cumulative_logprob for c in output.outputs] == [c.cumulative_logprob for c in every[:2]]


def test_best_of_needs_no_logprobs_to_be_shown():
    engine = make_engine()
    engine.add_request("x", prompt_of(9), params_of(1, best_of=5, max_tokens=6))
    engine.add_request("y", prompt_of(9), params_of(1, best_of=5, max_tokens=6, logprobs=0))
    outputs = run_all(engine)
    assert outputs["x"].outputs[0].logprobs is None
    assert tokens(outputs["x"]) == tokens(outputs["y"])


# -- the door -----------------------------------------------------------------------------------------------


def test_a_group_that_can_never_fit_is_refused_with_the_bytes_it_would_need():
    engine = make_engine(num_blocks=16)
    # 1 shared block and 4 times ceil(119 / 8) - 1 of 128 bytes, against 16 of them.
    with pytest.raises(
        ValueError, match=r"n=4 outputs of up to 111 tokens need 7\.1 KiB of KV cache, which has 2\.0 KiB"
    ):
        engine.add_request("x", prompt_of(9), params_of(4, max_tokens=111))
    with pytest.raises(ValueError, match="best_of=4 outputs"):
        engine.add_request("x", prompt_of(9), params_of(1, best_of=4, max_tokens=111))
    assert not engine.has_unfinished_requests()
    with pytest.raises(ValueError, match=r"n must be at most 2.*max_num_seqs.*got 3"):
        make_engine(max_num_seqs=2).add_request("x", prompt_of(9), params_of(3))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 20])
def test_without_max_tokens_a_group_ends_where_the_cache_does(length):
    engine = make_engine(num_blocks=16)
    engine.add_request("x", prompt_of(length), params_of(4, max_tokens=None))
    output = run_all(engine)["x"]
    shared = length // BLOCK_SIZE
    longest = (shared + (16 - shared) // 4) * BLOCK_SIZE + 1
    assert [len(c.token_ids) for c in output.outputs] == [longest - length] * 4
    assert {c.finish_reason for c in output.outputs} == {"length"}
    assert engine.stats().num_preemptions == 0
