"""Beam search against a cache-free reference, on a fake model: whatever shares the batch, in whatever chunks, and
however often it is preempted."""

from itertools import chain, pairwise

import numpy as np
import pytest
from beam_reference import beam_search
from fake_model import EOS, VOCAB_SIZE, SpreadDecoder, audit, make_engine, preempt, prompt_of, run_all, spread_logits

from cupaged.engine.scheduler import Scheduler
from cupaged.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

MIN_GAP = 2e-5  # log probabilities are float32, of which up to 30 are added


class CharTokenizer:
    """Token i is character i from "A" on."""

    vocab_size = VOCAB_SIZE

    def encode(self, text, add_special_tokens=True):
        return [ord(c) - ord("A") for c in text]

    def decode(self, token_ids, skip_special_tokens=True):
        return "".join(chr(ord("A") + i) for i in token_ids)

    def decoder(self, skip_special_tokens=True):
        return CharDecoder()


class CharDecoder:
    def push(self, token_id):
        return chr(ord("A") + token_id)

    def flush(self):
        return ""

    def copy(self):
        return self


def make_search_engine(**config):
    return make_engine(decoder=SpreadDecoder(), **config)


def expected(prompt, params: BeamSearchParams):
    """What the reference finds: it must not hang on a hair."""
    decode = CharTokenizer().decode
    found, gap = beam_search(
        spread_logits,
        prompt,
        params.beam_width,
        params.max_tokens,
        stop_token_ids={*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))},
        ends=lambda tokens: any(s in decode(tokens) for s in params.stop),
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
    )
    assert gap > MIN_GAP
    return found


def assert_found(output, prompt, params):
    found = expected(prompt, params)
    assert output.finished
    assert [c.token_ids for c in output.outputs] == [f.token_ids for f in found]
    assert [c.index for c in output.outputs] == list(range(len(found)))
    for completion, wanted in zip(output.outputs, found, strict=True):
        assert completion.cumulative_logprob == pytest.approx(sum(wanted.logprobs), abs=1e-5)
    return found


# Lengths of the prompt at and around block borders (block_size 8), and outputs that cross several of them.
PROMPTS = [prompt_of(length, salt=length) for length in (1, 7, 8, 9, 20)]


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_class_34_beams_are_those_of_the_reference(width, ignore_eos, async_scheduling):
    for prompt in PROMPTS:
        engine = make_search_engine(async_scheduling=async_scheduling)
        params = BeamSearchParams(width, 20, ignore_eos)
        engine.add_request("x", prompt, params)
        output = run_all(engine)["x"]
        assert_found(output, prompt, params)
        assert len(output.outputs) == width
        assert {c.finish_reason for c in output.outputs} <= {"stop", "length"}
        assert engine.stats().num_used_blocks == 0
        assert engine.audit() == []


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.6, 1.0, 2.5])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_scores_and_the_end_of_the_search(length_penalty, early_stopping):
    params = BeamSearchParams(4, 20, length_penalty=length_penalty, early_stopping=early_stopping)
    engine = make_search_engine()
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, params)
    outputs = run_all(engine)
    for i, prompt in enumerate(PROMPTS):
        assert_found(outputs[str(i)], prompt, params)


def test_the_rules_for_the_end_make_a_difference():
    lengths = {}
    for early_stopping in (True, False, "never"):
        engine = make_search_engine()
        engine.add_request("x", PROMPTS[2], BeamSearchParams(3, 20, early_stopping=early_stopping))
        run_all(engine)
        lengths[early_stopping] = engine.stats().num_steps
    assert lengths[True] < lengths[False] < lengths["never"]


@pytest.mark.parametrize("chunk", [4, 7, 8, 9, 100])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_neighbours_and_chunks_change_nothing(chunk, caching, async_scheduling):
    engine = make_search_engine(
        max_num_batched_tokens=chunk, enable_prefix_caching=caching, async_scheduling=async_scheduling
    )
    params = [BeamSearchParams(width, 15) for width in (1, 2, 3, 4, 4)]
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(f"beams {i}", prompt, params[i])
        engine.add_request(f"sampled {i}", prompt, SamplingParams(n=2, seed=i, max_tokens=15, ignore_eos=True))
        engine.add_request(f"greedy {i}", prompt, SamplingParams(temperature=0, logprobs=2, max_tokens=15))
    outputs = run_all(engine)
    for i, prompt in enumerate(PROMPTS):
        assert_found(outputs[f"beams {i}"], prompt, params[i])
        [greedy] = outputs[f"greedy {i}"].outputs
        assert [len(entries) for entries in greedy.logprobs] in ([2] * len(greedy.token_ids),)
        for n, token in enumerate(greedy.token_ids):
            assert token == spread_logits(prompt + greedy.token_ids[:n]).argmax()
        assert len({tuple(c.token_ids) for c in outputs[f"sampled {i}"].outputs}) == 2


@pytest.mark.parametrize("width", [2, 3, 5, 8])
@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_forced_preemption_loses_nothing(width, every, caching, mode):
    """Resumed, beams of one group get their next tokens together, though the budget is too small to compute them all
    again in one step."""
    engine = make_search_engine(
        enable_prefix_caching=caching, max_num_batched_tokens=16, num_blocks=128, preemption_mode=mode,
        swap_space_bytes=1 << 20,
    )  # fmt: skip
    params = BeamSearchParams(width, 16, early_stopping="never")
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, params)
    outputs, num_steps = {}, 0
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step() if output.finished}
        num_steps += 1
        if num_steps % every == 0 and len(engine.scheduler.running) > 1:
            preempt(engine, engine.scheduler.running[-1])
        audit(engine)
    assert engine.stats().num_preemptions >= 14 // every
    assert (engine.stats().num_swaps > 0) == (mode == "swap")
    for i, prompt in enumerate(PROMPTS):
        assert_found(outputs[str(i)], prompt, params)
    assert engine.stats().num_used_blocks == 0


@pytest.mark.parametrize("num_steps", range(2, 14))
def test_one_group_preempted_at_any_step_resumes(num_steps):
    engine = make_search_engine(max_num_batched_tokens=8)
    params = BeamSearchParams(4, 16, early_stopping="never")
    engine.add_request("x", PROMPTS[3], params)
    for _ in range(num_steps):
        engine.step()
    if engine.scheduler.running:
        engine.scheduler.preempt(engine.scheduler.running[0])
        assert engine.stats().num_used_blocks == 0
    assert_found(run_all(engine)["x"], PROMPTS[3], params)


@pytest.mark.parametrize("width", [2, 4, 6])
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_small_cache_preempts_whole_groups(width, async_scheduling):
    params = BeamSearchParams(width, 18, ignore_eos=True)
    engine = make_search_engine(num_blocks=2 + 4 * width, max_model_len=64, async_scheduling=async_scheduling)
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, params)
    outputs = run_all(engine)
    assert engine.stats().num_preemptions > 0
    for i, prompt in enumerate(PROMPTS):
        assert_found(outputs[str(i)], prompt, params)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_beams_share_their_blocks_and_copy_only_when_two_go_on_from_one(monkeypatch, async_scheduling):
    """Copies are counted against the forks: each child beyond the first of a half-full block needs one."""
    engine = make_search_engine(num_blocks=512, async_scheduling=async_scheduling)
    params = BeamSearchParams(6, 40, ignore_eos=True)
    replace_beams, expected_copies, num_launched = Scheduler.replace_beams, 0, 0

    def count(self, forks, *, are_launched):
        nonlocal expected_copies, num_launched
        num_launched += are_launched
        if len(forks[0][0].token_ids) % 8 if forks else 0:
            expected_copies += len(forks)
        for parent, _ in forks:
            tables.setdefault(id(parent.block_table), (parent.block_table, list(parent.block_table)))
        replace_beams(self, forks, are_launched=are_launched)
        for table, before in tables.values():
            assert table == before  # a parent's table is left alone
        tables.clear()

    tables = {}
    monkeypatch.setattr(Scheduler, "replace_beams", count)
    prompt = prompt_of(64)
    engine.add_request("x", prompt, params)
    assert_found(run_all(engine)["x"], prompt, params)
    stats = engine.stats()
    assert 0 < stats.num_copies == expected_copies
    assert num_launched == (38 if async_scheduling else 0)  # all steps but the prompt's and the last one
    assert stats.mean_sharing > 0.6
    assert stats.peak_used_blocks < 8 + 6 * 5


def test_a_beam_that_goes_on_alone_copies_nothing():
    engine, params = make_search_engine(), BeamSearchParams(1, 20, ignore_eos=True)
    engine.add_request("x", PROMPTS[3], params)
    assert_found(run_all(engine)["x"], PROMPTS[3], params)
    assert engine.stats().num_copies == 0


def test_logprobs_of_each_hypothesis():
    engine, params = make_search_engine(tokenizer=CharTokenizer()), BeamSearchParams(3, 12, logprobs=7)
    engine.add_request("x", PROMPTS[4], params)
    output = run_all(engine)["x"]
    for completion, wanted in zip(output.outputs, assert_found(output, PROMPTS[4], params), strict=True):
        assert len(completion.logprobs) == len(completion.token_ids)
        for n, (token, entries) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
            logits = spread_logits(PROMPTS[4] + completion.token_ids[:n]).astype(np.float64)
            order = np.argsort(-logits).tolist()
            assert set(entries) == {token, *order[:7]}
            for i, entry in entries.items():
                assert entry.logprob == pytest.approx(logits[i] - np.log(np.exp(logits).sum()), abs=1e-5)
                assert entry.rank == 1 + order.index(i)
                assert entry.decoded_token == chr(ord("A") + i)
            assert entries[token].logprob == pytest.approx(wanted.logprobs[n], abs=1e-5)


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_and_stop_token_ids(include):
    """Strings of two tokens, of which the first may belong to a beam's parent."""
    tokenizer, reasons = CharTokenizer(), set()
    for i, prompt in enumerate(PROMPTS):
        plain = [tokenizer.decode(f.token_ids) for f in expected(prompt, BeamSearchParams(4, 16, ignore_eos=True))]
        params = BeamSearchParams(
            4, 16, i % 2 == 1, stop=[plain[0][3:5], plain[-1][9:11], plain[1][-1]], stop_token_ids=[7, 40],
            include_stop_str_in_output=include, early_stopping="never",
        )  # fmt: skip
        engine = make_search_engine(tokenizer=tokenizer)
        engine.add_request("x", prompt, params)
        output = run_all(engine)["x"]
        assert_found(output, prompt, params)
        for completion in output.outputs:
            whole, stop = tokenizer.decode(completion.token_ids), completion.stop_reason
            reasons.add((completion.finish_reason, len(stop) if isinstance(stop, str) else type(stop)))
            if isinstance(stop, str):
                assert whole.endswith(stop)
                assert completion.text == (whole if include else whole.removesuffix(stop))
            elif completion.finish_reason == "stop":
                assert completion.token_ids[-1] == (EOS if stop is None else stop)
                assert completion.text == (whole if include else whole[:-1])
            else:
                assert completion.text == whole
    assert {("stop", 1), ("stop", 2), ("stop", int), ("stop", type(None))} <= reasons


@pytest.mark.parametrize("kind", [RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA])
@pytest.mark.parametrize("stop", [None, ["XY", "]a"]])
def test_what_is_streamed_begins_the_best_output(kind, stop):
    engine = make_search_engine(tokenizer=CharTokenizer())
    params = BeamSearchParams(3, 30, ignore_eos=True, logprobs=1, stop=stop, output_kind=kind)
    engine.add_request("x", PROMPTS[4], params)
    texts, tokens, logprobs, num_outputs = [], [], [], 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            num_outputs += 1
            best = output.outputs[0]
            texts.append(best.text), tokens.append(best.token_ids), logprobs.append(best.logprobs)
            if not output.finished:
                assert len(output.outputs) == 1
                assert best.finish_reason is None
                assert best.token_ids
    assert num_outputs > 3
    assert len(output.outputs) == 3
    if kind is RequestOutputKind.DELTA:
        [wanted, *_] = expected(PROMPTS[4], params)
        assert list(chain(*tokens)) == wanted.token_ids
        assert "".join(texts) == CharTokenizer().decode(wanted.token_ids)
        assert len(list(chain(*logprobs))) == len(wanted.token_ids)
        assert [c.token_ids for c in output.outputs[1:]] == [f.token_ids for f in expected(PROMPTS[4], params)[1:]]
    else:
        assert_found(output, PROMPTS[4], params)
        for earlier, later in pairwise(tokens):
            assert later[: len(earlier)] == earlier
        for earlier, later in pairwise(texts):
            assert later.startswith(earlier)


@pytest.mark.parametrize("num_steps", range(8))
def test_abort_gives_what_is_found_so_far_and_leaks_nothing(num_steps):
    engine, params = make_search_engine(max_num_batched_tokens=16), BeamSearchParams(4, 16)
    engine.add_request("x", PROMPTS[4], params)
    engine.add_request("y", PROMPTS[3], params)
    for _ in range(num_steps):
        engine.step()
    with pytest.raises(ValueError, match="'x' is a beam search"):
        engine.abort("x", 1)
    output = engine.abort("x")
    assert output.finished
    assert 1 <= len(output.outputs) <= 4
    assert {c.finish_reason for c in output.outputs} <= {"abort", "stop"}
    assert output.outputs[-1].finish_reason == "abort" or num_steps > 3
    assert [c.index for c in output.outputs] == list(range(len(output.outputs)))
    for completion in output.outputs:
        logprob = 0.0
        for n, token in enumerate(completion.token_ids):
            logits = spread_logits(PROMPTS[4] + completion.token_ids[:n]).astype(np.float64)
            logprob += logits[token] - np.log(np.exp(logits).sum())
        assert completion.cumulative_logprob == pytest.approx(logprob, abs=1e-5)
    audit(engine)
    assert_found(run_all(engine)["y"], PROMPTS[3], params)
    assert engine.stats().num_used_blocks == 0


def test_fewer_continuations_than_beams():
    """The first step has VOCAB_SIZE continuations; stop tokens leave less than the beams."""
    prompt, num_left = PROMPTS[1], 3
    stop = [i for i in range(1, VOCAB_SIZE) if i not in np.argsort(spread_logits(prompt))[-num_left:]]
    params = BeamSearchParams(6, 5, stop_token_ids=stop, early_stopping="never")
    engine = make_search_engine()
    engine.add_request("x", prompt, params)
    assert_found(run_all(engine)["x"], prompt, params)


def test_a_model_gone_wrong_ends_the_search_with_an_error():
    engine = make_search_engine()
    engine.runner.decoder.logits_after = lambda token_ids: np.full(VOCAB_SIZE, np.nan, np.float32)
    engine.add_request("x", PROMPTS[1], BeamSearchParams(3, 5))
    output = run_all(engine)["x"]
    assert {c.finish_reason for c in output.outputs} == {"error"}
    assert "no finite logit after 7 tokens" in output.outputs[0].error
    assert engine.stats().num_used_blocks == 0


@pytest.mark.parametrize("num_steps", range(5))
def test_a_failing_step_leaks_nothing(num_steps):
    engine, params = make_search_engine(max_num_batched_tokens=12), BeamSearchParams(4, 12)
    engine.add_request("x", PROMPTS[4], params)
    for _ in range(num_steps):
        engine.step()
    engine.runner.decoder.fail = RuntimeError("a kernel failed")
    with pytest.raises(RuntimeError, match="a kernel failed"):
        engine.step()
    audit(engine)
    assert engine.stats().num_used_blocks == 0
    engine.add_request("x", PROMPTS[4], params)
    assert_found(run_all(engine)["x"], PROMPTS[4], params)


def test_what_cannot_be_run_is_refused():
    engine = make_search_engine(num_blocks=16)
    with pytest.raises(ValueError, match=r"beam_width=4 outputs of up to 111 tokens need 7\.1 KiB"):
        engine.add_request("x", prompt_of(9), BeamSearchParams(4, 111))
    with pytest.raises(ValueError, match=r"beam_width must be at most 2.*max_num_seqs.*got 3"):
        make_search_engine(max_num_seqs=2).add_request("x", prompt_of(9), BeamSearchParams(3, 5))
    with pytest.raises(ValueError, match="stop: strings need a tokenizer"):
        engine.add_request("x", prompt_of(9), BeamSearchParams(2, 5, stop="x"))
    assert not engine.has_unfinished_requests()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beam_width": 0}, "beam_width must be an integer >= 1; got 0"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"temperature": 0.7}, "temperature must be 0"),
        ({"length_penalty": float("nan")}, "length_penalty must be a finite number"),
        ({"early_stopping": "always"}, "early_stopping must be True, False or"),
        ({"stop": [""]}, "stop must be"),
        ({"logprobs": 99}, "logprobs must be"),
    ],
)
def test_parameters_that_make_no_sense_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 5, **fields})
