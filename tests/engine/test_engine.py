"""Requests through the whole engine, on the fake model: each answer is a pure function of its prompt."""

import pytest
from fake_model import (
    EOS,
    VOCAB_SIZE,
    audit,
    expected_output,
    make_engine,
    model_with,
    most_likely_token,
    prompt_of,
    run_all,
)

from cupaged.sampling_params import RequestOutputKind, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def greedy(**fields):
    return SamplingParams(**{"temperature": 0, "max_tokens": 20, "ignore_eos": True, **fields})


class LetterTokenizer:
    """Token i is a letter, or a few: pieces[i]."""

    def __init__(self, pieces=None):
        self.pieces = pieces or [chr(ord("a") + i % 26) for i in range(VOCAB_SIZE)]
        self.vocab_size = len(self.pieces)

    def encode(self, text):
        return [ord(c) % VOCAB_SIZE for c in text]

    def decode(self, token_ids, skip_special_tokens=True):
        return "".join(self.pieces[i] for i in token_ids)

    def decoder(self, skip_special_tokens=True):
        tokenizer = self

        class Decoder:
            def push(self, token_id):
                return tokenizer.pieces[token_id]

            def flush(self):
                return ""

        return Decoder()


# -- the same tokens, however they are scheduled ------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 7, 8, 9, 100])
def test_chunks_of_any_size_give_the_same_output(chunk):
    engine = make_engine(max_num_batched_tokens=chunk)
    prompts = [prompt_of(n, salt=n) for n in (1, 7, 8, 9, 30)]
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, GREEDY)
    outputs = run_all(engine)
    for i, prompt in enumerate(prompts):
        assert outputs[str(i)].outputs[0].token_ids == expected_output(prompt, 20, ignore_eos=True)


@pytest.mark.parametrize("num_blocks", [7, 8, 9, 11, 15])
def test_preemption_changes_no_output_and_stops_nobody(num_blocks):
    engine = make_engine(num_blocks)
    prompts = [prompt_of(5 * n + 1, salt=n) for n in range(7)]
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy(output_kind=RequestOutputKind.DELTA))
    tokens = {str(i): [] for i in range(len(prompts))}
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id] += output.outputs[0].token_ids
        audit(engine)
    assert engine.stats().num_preemptions > 0
    for i, prompt in enumerate(prompts):
        assert tokens[str(i)] == expected_output(prompt, 20, ignore_eos=True)  # none lost, none repeated


def test_seeded_draws_do_not_depend_on_neighbours_or_preemption():
    prompt, params = prompt_of(11), SamplingParams(seed=5, max_tokens=20, ignore_eos=True)
    alone = make_engine()
    alone.add_request("x", prompt, params)
    expected = expected_output(prompt, 20, seed=5, ignore_eos=True)
    assert run_all(alone)["x"].outputs[0].token_ids == expected

    crowded = make_engine(num_blocks=9)
    for i in range(3):
        crowded.add_request(f"before {i}", prompt_of(9, salt=i), GREEDY)
    crowded.add_request("x", prompt, params)
    crowded.add_request("after", prompt_of(4), SamplingParams(max_tokens=30, ignore_eos=True))
    assert run_all(crowded)["x"].outputs[0].token_ids == expected
    assert crowded.stats().num_preemptions > 0


def test_the_engine_seed_decides_for_requests_without_one():
    def tokens(seed):
        engine = make_engine(seed=seed)
        for name in "ab":
            engine.add_request(name, [1, 2, 3], SamplingParams(ignore_eos=True))
        outputs = run_all(engine)
        return [outputs[name].outputs[0].token_ids for name in "ab"]

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)
    first, second = tokens(3)
    assert first != second


# -- ends ---------------------------------------------------------------------------------------------------


def prompt_that_soon_gives(token_id, within=20):
    """A prompt whose greedy output has `token_id` in it, neither first nor late."""
    for salt in range(500):
        prompt = prompt_of(4, salt)
        output = expected_output(prompt, within, ignore_eos=True)
        if token_id in output and output.index(token_id) >= 1:
            return prompt, output
    raise AssertionError("no such prompt")


def test_eos_ends_the_output_and_is_its_last_token():
    prompt, tokens = prompt_that_soon_gives(EOS)
    engine = make_engine(tokenizer=LetterTokenizer())
    engine.add_request("x", prompt, greedy(ignore_eos=False))
    completion = run_all(engine)["x"].outputs[0]
    assert completion.token_ids == tokens[: tokens.index(EOS) + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
    assert len(completion.text) == len(completion.token_ids) - 1


def test_every_id_of_an_eos_list_ends_the_output():
    prompt, _ = prompt_that_soon_gives(17)
    engine = make_engine(model=model_with(eos_token_ids=(49, 17)))
    engine.add_request("x", prompt, greedy(ignore_eos=False))
    assert run_all(engine)["x"].outputs[0].token_ids[-1] in (17, 49)


@pytest.mark.parametrize("include", [False, True])
def test_stop_token_ids(include):
    prompt, tokens = prompt_that_soon_gives(17)
    count = tokens.index(17) + 1
    engine = make_engine(tokenizer=LetterTokenizer())
    engine.add_request("x", prompt, greedy(stop_token_ids=[17], include_stop_str_in_output=include))
    completion = run_all(engine)["x"].outputs[0]
    assert completion.token_ids == tokens[:count]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", 17)
    assert len(completion.text) == (count if include else count - 1)


@pytest.mark.parametrize("kind", list(RequestOutputKind))
@pytest.mark.parametrize("start", range(6))
@pytest.mark.parametrize("length", [1, 2, 5])
def test_stop_strings_over_token_borders(start, length, kind):
    """Pieces of one to three letters: a stop string begins and ends inside of tokens."""
    pieces = ["abcdefg"[i % 7 : i % 7 + 1 + i % 3] for i in range(VOCAB_SIZE)]
    tokens = expected_output([5, 6, 7], 20, ignore_eos=True)
    text = "".join(pieces[i] for i in tokens)
    stop = text[start : start + length]
    begin = text.index(stop)

    engine = make_engine(tokenizer=LetterTokenizer(pieces))
    engine.add_request("x", [5, 6, 7], greedy(stop=stop, output_kind=kind))
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    completion = outputs[-1].outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    shown = "".join(o.outputs[0].text for o in outputs) if kind is RequestOutputKind.DELTA else completion.text
    assert shown == text[:begin]
    if kind is not RequestOutputKind.DELTA:
        seen = "".join(pieces[i] for i in completion.token_ids)
        assert begin + length <= len(seen) < begin + length + 3  # it stopped at the token that completed it
    if kind is RequestOutputKind.FINAL_ONLY:
        assert len(outputs) == 1


def test_max_tokens_and_max_model_len_end_with_length():
    engine = make_engine(max_model_len=16)
    engine.add_request("a", prompt_of(5), greedy(max_tokens=3))
    engine.add_request("b", prompt_of(5), greedy(max_tokens=None))
    engine.add_request("c", prompt_of(15), greedy(max_tokens=9))
    outputs = run_all(engine)
    assert {k: len(o.outputs[0].token_ids) for k, o in outputs.items()} == {"a": 3, "b": 11, "c": 1}
    assert {o.outputs[0].finish_reason for o in outputs.values()} == {"length"}
    assert outputs["b"].finished


def test_a_stop_token_at_the_length_limit_is_a_stop():
    prompt, tokens = prompt_that_soon_gives(17)
    engine = make_engine()
    engine.add_request("x", prompt, greedy(stop_token_ids=[17], max_tokens=tokens.index(17) + 1))
    assert run_all(engine)["x"].outputs[0].finish_reason == "stop"


def test_a_sequence_without_finite_logits_fails_alone():
    engine = make_engine()
    prompt = prompt_of(6)
    tokens = expected_output(prompt, 20, ignore_eos=True)
    engine.runner.decoder.nan_after = 999
    other = next(p for p in (prompt_of(6, s) for s in range(1, 99)) if p[-1] not in (*tokens, prompt[-1]))
    engine.runner.decoder.nan_after = other[-1]
    engine.add_request("good", prompt, GREEDY)
    engine.add_request("bad", other, GREEDY)
    outputs = run_all(engine)
    bad = outputs["bad"].outputs[0]
    assert (bad.finish_reason, bad.token_ids) == ("error", [])
    assert "finite" in bad.error
    assert outputs["good"].outputs[0].token_ids == tokens


# -- outputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_output_kinds(kind):
    engine = make_engine(tokenizer=LetterTokenizer())
    engine.add_request("x", prompt_of(9), greedy(output_kind=kind, logprobs=1, max_tokens=5))
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    tokens = expected_output(prompt_of(9), 5, ignore_eos=True)
    expected = {
        RequestOutputKind.CUMULATIVE: [tokens[: n + 1] for n in range(5)],
        RequestOutputKind.DELTA: [[t] for t in tokens],
        RequestOutputKind.FINAL_ONLY: [tokens],
    }[kind]
    assert [o.outputs[0].token_ids for o in outputs] == expected
    for output in outputs:
        completion = output.outputs[0]
        assert completion.text == LetterTokenizer().decode(completion.token_ids)
        assert [next(iter(entry)) for entry in completion.logprobs] == completion.token_ids
    assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
    metrics = outputs[-1].metrics
    assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time <= metrics.finished_time


def test_logprobs_only_for_who_asks_and_as_many_as_asked():
    engine = make_engine(tokenizer=LetterTokenizer())
    for name, logprobs in (("none", None), ("own", 0), ("two", 2)):
        engine.add_request(name, prompt_of(5), SamplingParams(seed=1, max_tokens=8, ignore_eos=True, logprobs=logprobs))
    outputs = {name: output.outputs[0] for name, output in run_all(engine).items()}
    assert outputs["none"].logprobs is None
    assert outputs["none"].cumulative_logprob is None
    token_ids = prompt_of(5)
    for token_id, own, two in zip(
        outputs["two"].token_ids, outputs["own"].logprobs, outputs["two"].logprobs, strict=True
    ):
        best = most_likely_token(token_ids)
        assert list(own) == [token_id]
        assert len(two) == (2 if token_id in (best, 0 if best else 1) else 3)
        assert two[best].rank == 1
        assert two[token_id].logprob == own[token_id].logprob
        assert two[token_id].decoded_token == LetterTokenizer().decode([token_id])
        assert two[token_id].rank == (1 if token_id == best else 2)
        token_ids.append(token_id)
    total = sum(entry[t].logprob for t, entry in zip(outputs["two"].token_ids, outputs["two"].logprobs, strict=True))
    assert outputs["two"].cumulative_logprob == pytest.approx(total)


# -- the door -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is empty"),
        ("", "prompt is empty"),
        ([1, -1], r"token ids must be in \[0, 50\); got -1"),
        ([1, VOCAB_SIZE], r"token ids must be in \[0, 50\); got 50"),
        ([1] * 64, "64 tokens.* max_model_len=64: shorten it or raise max_model_len"),
        ([1.5], "prompt must be text or integer token ids"),
    ],
)
def test_a_request_that_can_never_run_is_refused_and_leaves_no_trace(prompt, message):
    engine = make_engine(num_blocks=8, tokenizer=LetterTokenizer())
    assert engine.max_model_len == 64
    with pytest.raises(ValueError, match=message):
        engine.add_request("x", prompt, GREEDY)
    assert not engine.has_unfinished_requests()
    engine.add_request("x", [1] * 63, GREEDY)
    assert len(run_all(engine)["x"].outputs[0].token_ids) == 1


def test_a_request_id_may_be_used_again_only_when_its_request_has_finished():
    engine = make_engine()
    engine.add_request("x", [1], GREEDY)
    with pytest.raises(ValueError, match="'x' is in use"):
        engine.add_request("x", [1], GREEDY)
    run_all(engine)
    engine.add_request("x", [1], GREEDY)


def test_text_needs_a_tokenizer():
    engine = make_engine()
    with pytest.raises(ValueError, match="prompt: text needs a tokenizer"):
        engine.add_request("x", "hello", GREEDY)
    with pytest.raises(ValueError, match="stop: strings need a tokenizer"):
        engine.add_request("x", [1], greedy(stop="a"))


# -- abort and failure --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", range(8))
def test_abort_at_every_step_leaks_nothing_and_disturbs_nobody(num_steps):
    """Ten steps in which "x" waits, prefills in chunks, decodes and is preempted."""
    engine = make_engine(num_blocks=6, max_num_batched_tokens=8)
    engine.add_request("a", prompt_of(9), GREEDY)
    engine.add_request("x", prompt_of(20), GREEDY)
    engine.add_request("b", prompt_of(9, salt=1), GREEDY)
    for _ in range(num_steps):
        engine.step()
    output = engine.abort("x")
    assert output.finished
    assert output.outputs[0].finish_reason == "abort"
    count = len(output.outputs[0].token_ids)
    assert output.outputs[0].token_ids == expected_output(prompt_of(20), count, ignore_eos=True)
    assert engine.abort("x") is None
    audit(engine)
    outputs = run_all(engine)
    assert outputs["a"].outputs[0].token_ids == expected_output(prompt_of(9), 20, ignore_eos=True)
    assert outputs["b"].outputs[0].token_ids == expected_output(prompt_of(9, salt=1), 20, ignore_eos=True)
    assert "x" not in outputs
    assert engine.stats().num_used_blocks == 0


def test_abort_settles_text_that_was_held_back():
    pieces = ["ab"] * VOCAB_SIZE
    engine = make_engine(tokenizer=LetterTokenizer(pieces))
    engine.add_request("x", [1], greedy(stop="babx"))
    engine.step()
    assert engine.step()[0].outputs[0].text == "a"
    assert engine.abort("x").outputs[0].text == "abab"


@pytest.mark.parametrize("error", [RuntimeError("a kernel failed"), KeyboardInterrupt()])
def test_an_exception_in_a_step_ends_its_requests_only(error):
    engine = make_engine(max_num_seqs=2)
    for name in "abc":
        engine.add_request(name, prompt_of(9), GREEDY)
    engine.step()
    engine.runner.decoder.fail = error
    with pytest.raises(type(error)):
        engine.step()
    audit(engine)
    assert [engine.has_request(name) for name in "abc"] == [False, False, True]
    assert engine.stats().num_used_blocks == 0
    engine.add_request("a", prompt_of(9, salt=3), GREEDY)
    outputs = run_all(engine)
    assert outputs["a"].outputs[0].token_ids == expected_output(prompt_of(9, salt=3), 20, ignore_eos=True)
    assert outputs["c"].outputs[0].token_ids == expected_output(prompt_of(9), 20, ignore_eos=True)


def test_an_exception_after_the_tokens_were_drawn_leaks_nothing():
    class BrokenTokenizer(LetterTokenizer):
        def decode(self, token_ids, skip_special_tokens=True):
            raise RuntimeError("broken tokenizer")

    engine = make_engine(tokenizer=BrokenTokenizer())
    engine.add_request("a", prompt_of(9), greedy(logprobs=1))
    with pytest.raises(RuntimeError, match="broken tokenizer"):
        engine.step()
    audit(engine)
    assert not engine.has_unfinished_requests()
    engine.add_request("b", prompt_of(9), GREEDY)
    assert run_all(engine)["b"].finished


def test_memory_that_the_device_does_not_have_after_all():
    """The cache may grow to 8 blocks, but the host program took the memory: the oldest request gets the rest."""
    engine = make_engine(num_blocks=8)
    engine.add_request("big", prompt_of(30), GREEDY)
    engine.add_request("small", prompt_of(2), greedy(max_tokens=6))
    engine.backend.out_of_memory = True  # one block exists
    outputs = run_all(engine)
    big = outputs["big"].outputs[0]
    assert (big.finish_reason, big.token_ids) == ("error", [])
    assert "1 KV cache blocks" in big.error
    assert outputs["small"].outputs[0].token_ids == expected_output(prompt_of(2), 6, ignore_eos=True)


# -- memory -------------------------------------------------------------------------------------------------


def test_the_cache_grows_with_demand_and_preallocate_takes_all_at_once():
    engine = make_engine(num_blocks=64)
    assert engine.stats().num_slabs == 1
    engine.add_request("x", prompt_of(100), GREEDY)
    engine.step()
    slabs = engine.stats().num_slabs
    assert 1 < slabs < engine.arena.max_slabs
    run_all(engine)
    assert engine.stats().num_slabs == slabs
    stats = make_engine(num_blocks=64, preallocate=True).stats()
    assert stats.num_blocks == stats.max_blocks == 64


def test_stats_count_what_they_say():
    engine = make_engine(num_blocks=64, max_num_seqs=2)
    for salt, name in enumerate("abc"):
        engine.add_request(name, prompt_of(10, salt), greedy(max_tokens=3))
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (2, 1)
    assert stats.num_used_blocks == 4
    assert stats.num_free_blocks == stats.num_blocks - 4
    assert stats.num_unfilled_slots == 2 * (16 - 10)
    assert stats.mean_waste == pytest.approx(6 / 16)
    assert stats.kv_cache_bytes == stats.num_blocks * 8 * 16
    run_all(engine)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert stats.peak_used_blocks == 4
    assert (stats.num_prompt_tokens, stats.num_output_tokens) == (30, 9)
    assert stats.num_steps == 6


def test_close_ends_everything_and_gives_the_memory_back():
    engine = make_engine()
    engine.add_request("x", prompt_of(10), GREEDY)
    engine.step()
    engine.close()
    assert engine.backend.closed
    assert not engine.arena.slabs
    assert not engine.has_unfinished_requests()
