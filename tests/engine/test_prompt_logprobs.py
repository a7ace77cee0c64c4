"""Log probabilities of a prompt's own tokens: the same whatever is shared, cached, chunked or preempted."""

import numpy as np
import pytest
from fake_model import (
    BYTES_PER_TOKEN,
    VOCAB_SIZE,
    SpreadDecoder,
    assert_scored,
    make_engine,
    model_with,
    params_of,
    preempt,
    prompt_of,
    run_all,
    tokens,
)

from cupaged.sampling_params import RequestOutputKind, SamplingParams

BLOCK_SIZE = 8  # of make_engine
CHUNKS = [1, 3, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 100]
K = 3


def new_engine(window=None, **config):
    model = model_with(sliding_window=window)
    engine = make_engine(model=model, swap_space_bytes=64 * BLOCK_SIZE * BYTES_PER_TOKEN, **config)
    engine.runner.decoder = SpreadDecoder(window)
    return engine


def scoring(k=K, **fields):
    return params_of(**{"max_tokens": 5, "prompt_logprobs": k, **fields})


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("window", [None, 5, 11])
def test_class_26_chunks_and_hits_change_nothing(chunk, caching, window):
    """Each prompt comes twice, and the longer ones begin with the shorter: their beginnings are cached, if anything is.
    Others that ask for nothing, or for other numbers of tokens, run beside them."""
    engine = new_engine(window, max_num_batched_tokens=chunk, enable_prefix_caching=caching, max_num_seqs=5)
    lengths = [1, 2, BLOCK_SIZE, BLOCK_SIZE + 1, 3 * BLOCK_SIZE + 2]
    for length in [*lengths, *lengths]:
        engine.add_request("plain", prompt_of(length), params_of(max_tokens=5))
        for k in (K, 0, 20):
            engine.add_request(str(k), prompt_of(length), scoring(k))
        outputs = run_all(engine)
        assert outputs["plain"].prompt_logprobs is None
        for k in (K, 0, 20):
            assert_scored(outputs[str(k)].prompt_logprobs, prompt_of(length), k, window)
            assert tokens(outputs[str(k)]) == tokens(outputs["plain"])
            assert outputs[str(k)].num_cached_tokens == 0
        found = outputs["plain"].num_cached_tokens
    assert (found == 3 * BLOCK_SIZE) is caching  # what they computed is there for others


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 3])
def test_preempted_prompts_are_scored_once(mode, caching, every, n):
    engine = new_engine(preemption_mode=mode, enable_prefix_caching=caching, max_num_batched_tokens=7)
    prompts = {str(length): prompt_of(length, length) for length in (12, 16, 27)}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, scoring(n=n))
    last, num_steps = {}, 0
    while engine.has_unfinished_requests():
        last |= {output.request_id: output for output in engine.step()}
        num_steps += 1
        if num_steps % every == 0 and len(engine.scheduler.running) > 1:
            preempt(engine, engine.scheduler.running[-1])
    assert engine.stats().num_preemptions > 0
    for name, prompt in prompts.items():
        assert_scored(last[name].prompt_logprobs, prompt, K)
        assert len(last[name].outputs) == n


def test_what_was_scored_before_a_preemption_may_come_from_the_cache():
    engine = new_engine(max_num_batched_tokens=BLOCK_SIZE)
    engine.add_request("x", prompt_of(30), scoring(max_tokens=1))
    engine.step()
    engine.step()
    preempt(engine, engine.scheduler.running[0])
    output = run_all(engine)["x"]
    assert_scored(output.prompt_logprobs, prompt_of(30), K)
    assert sum(sum(lens) for _, lens in engine.runner.decoder.batches) == 30  # no token was computed twice


def test_logits_are_taken_in_groups_no_larger_than_the_decoder_allows():
    engine = new_engine(max_num_seqs=4)
    compute_logits, sizes = engine.runner.decoder.compute_logits, []
    engine.runner.decoder.compute_logits = lambda indices: sizes.append(len(indices)) or compute_logits(indices)
    for name, length in (("a", 7), ("b", 12)):
        engine.add_request(name, prompt_of(length), scoring(max_tokens=1))
    outputs = run_all(engine)
    assert sizes == [2, 4, 4, 4, 4, 1]  # both are drawn for; then 6 + 11 tokens
    assert_scored(outputs["a"].prompt_logprobs, prompt_of(7), K)
    assert_scored(outputs["b"].prompt_logprobs, prompt_of(12), K)


def test_the_logprobs_of_generated_tokens_are_those_of_a_prompt():
    engine = new_engine()
    engine.add_request("x", prompt_of(9), SamplingParams(max_tokens=20, seed=1, ignore_eos=True, logprobs=2))
    completion = run_all(engine)["x"].outputs[0]
    engine.add_request("y", prompt_of(9) + completion.token_ids, scoring(2))
    assert run_all(engine)["y"].prompt_logprobs[9:] == completion.logprobs


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_they_come_with_the_first_output_and_as_deltas_only_once(kind):
    engine = new_engine(max_num_batched_tokens=4)
    engine.add_request("x", prompt_of(10), scoring(output_kind=kind, max_tokens=3))
    told = []
    while engine.has_unfinished_requests():
        told += [output.prompt_logprobs for output in engine.step()]
    assert len(told) == (1 if kind is RequestOutputKind.FINAL_ONLY else 3)
    assert_scored(told[0], prompt_of(10), K)
    later = None if kind is RequestOutputKind.DELTA else told[0]
    assert all(prompt_logprobs == later for prompt_logprobs in told[1:])


def test_one_that_ends_within_its_prompt_tells_what_it_has():
    engine = new_engine(max_num_batched_tokens=4)
    engine.add_request("x", prompt_of(10), scoring())
    assert engine.abort("x").prompt_logprobs == [None]
    engine.add_request("x", prompt_of(10), scoring())
    engine.step()
    prompt_logprobs = engine.abort("x").prompt_logprobs
    assert len(prompt_logprobs) == 5
    assert_scored(prompt_logprobs, prompt_of(5), K)


def test_the_first_of_several_outputs_ends_within_the_prompt():
    engine = new_engine(max_num_batched_tokens=4)
    engine.add_request("x", prompt_of(10), scoring(n=3))
    engine.step()
    engine.abort("x", 0)
    output = run_all(engine)["x"]
    assert_scored(output.prompt_logprobs, prompt_of(10), K)
    assert [len(completion.token_ids) for completion in output.outputs] == [0, 5, 5]


def test_tokens_that_the_tokenizer_lacks_have_no_chance():
    class Tokenizer:
        vocab_size = VOCAB_SIZE - 10

        def decode(self, token_ids, skip_special_tokens=True):
            return f"<{token_ids[0]}>"

        def decoder(self, skip_special_tokens=True):
            return None

    engine = make_engine(tokenizer=Tokenizer())
    engine.runner.decoder = SpreadDecoder()
    engine.add_request("x", [1, VOCAB_SIZE - 1, 2], scoring(0, detokenize=False))
    _, beyond, known = run_all(engine)["x"].prompt_logprobs
    assert beyond[VOCAB_SIZE - 1].logprob == -np.inf
    assert (known[2].logprob > -20, known[2].decoded_token) == (True, "<2>")
