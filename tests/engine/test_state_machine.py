"""Random walks over the engine: add, fork, search with beams, write to shared blocks, hit, evict, preempt both ways,
resume, abort all or a part, fail in the middle, run out of memory; every invariant after every step. Half of the walks
have two steps in flight, on a device that computes as late as it may.

CUPAGED_WALKS sets the number of walks, for a longer run.
"""

import os
import random

import pytest
from beam_reference import beam_search
from fake_model import (
    EOS,
    VOCAB_SIZE,
    LateDecoder,
    SpreadDecoder,
    assert_scored,
    audit,
    expected_output,
    make_engine,
    model_with,
    preempt,
    spread_logits,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule

from cupaged.engine.audit import audit as audit_books
from cupaged.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

MIN_GAP = 1e-5  # searches that hang on less are not compared: log probabilities are float32
NUM_WALKS = int(os.environ.get("CUPAGED_WALKS", "100"))
# Prompts are the beginnings of these, and of mixtures: they meet in the cache at every length.
TEXTS = [[random.Random(i).randrange(VOCAB_SIZE) for _ in range(60)] for i in range(3)]


class EngineWalk(RuleBasedStateMachine):
    requests = Bundle("requests")

    @initialize(
        num_blocks=st.integers(3, 16),
        max_num_seqs=st.integers(1, 6),
        max_num_batched_tokens=st.integers(1, 40),
        long_prefill_token_threshold=st.sampled_from([40, 40, 1, 5]),
        preallocate=st.booleans(),
        enable_prefix_caching=st.sampled_from([True, True, False]),
        scheduling_policy=st.sampled_from(["fcfs", "priority"]),
        hash_bytes=st.sampled_from([None, None, None, 0, 1]),
        preemption_mode=st.sampled_from(["recompute", "swap"]),
        window=st.sampled_from([None, None, 1, 5, 8, 19]),
        swap_space_bytes=st.sampled_from([1, 3, 20]).map(lambda num_blocks: num_blocks * 128),
        async_scheduling=st.booleans(),
        debug=st.booleans(),
    )
    def start(self, hash_bytes, window, **config):
        self.engine = make_engine(model=model_with(sliding_window=window), decoder=SpreadDecoder(window), **config)
        if hash_bytes is not None and self.engine.hasher is not None:
            self.engine.hasher.hash_block = lambda parent, data: bytes([(sum(parent) + sum(data)) % 7][:hash_bytes])
        self.by_priority = config["scheduling_policy"] == "priority"
        self.asked = {}  # request id -> (prompt, params)
        self.received = {}  # request id -> tokens of each output
        self.prompt_logprobs = {}  # request id -> what was received of them
        self.aborted = set()  # (request id, index)
        self.memory_was_short = False
        self.num_added = 0

    @rule(
        target=requests,
        length=st.integers(1, 40),
        text=st.integers(0, 2),
        turn=st.sampled_from([0, 0, 16, 19, 40]),
        n=st.sampled_from([1, 1, 2, 3, 4]),
        max_tokens=st.integers(1, 30),
        seed=st.none() | st.integers(0, 3),
        ignore_eos=st.booleans(),
        priority=st.integers(0, 2),
        cache_salt=st.sampled_from([None, None, "a"]),
        prompt_logprobs=st.sampled_from([None, None, 2]),
    )
    def add(self, length, text, turn, n, max_tokens, seed, ignore_eos, priority, cache_salt, prompt_logprobs):
        prompt = (TEXTS[text][:turn] + TEXTS[(text + 1) % 3][turn:])[:length]
        params = SamplingParams(
            n=n,
            temperature=0 if seed is None else 1,
            seed=seed,
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            prompt_logprobs=prompt_logprobs,
            output_kind=RequestOutputKind.DELTA,
        )
        return self.add_request(prompt, params, n, priority=priority, cache_salt=cache_salt)

    @rule(
        target=requests,
        length=st.integers(1, 40),
        text=st.integers(0, 2),
        width=st.integers(1, 5),
        max_tokens=st.integers(1, 12),
        ignore_eos=st.booleans(),
        early_stopping=st.sampled_from([False, True, "never"]),
        priority=st.integers(0, 2),
    )
    def add_beam_search(self, length, text, width, max_tokens, ignore_eos, early_stopping, priority):
        params = BeamSearchParams(
            width, max_tokens, ignore_eos, early_stopping=early_stopping, output_kind=RequestOutputKind.FINAL_ONLY
        )
        return self.add_request(TEXTS[text][:length], params, width, priority=priority)

    def add_request(self, prompt, params, n, **options):
        length, max_tokens = len(prompt), params.max_tokens
        request_id = str(self.num_added)
        self.num_added += 1
        block_size, shared = self.engine.config.block_size, length // self.engine.config.block_size
        end = min(length + max_tokens, self.engine.max_model_len)
        num_blocks = shared + n * (-(-(end - 1) // block_size) - shared)
        too_long = length >= self.engine.max_model_len
        try:
            self.engine.add_request(request_id, prompt, params, **options)
        except ValueError:
            assert too_long or n > self.engine.scheduler.max_num_seqs or num_blocks > self.engine.arena.max_blocks
            return multiple()
        assert not too_long
        assert n <= self.engine.scheduler.max_num_seqs
        assert num_blocks <= self.engine.arena.max_blocks
        self.asked[request_id], self.received[request_id] = (prompt, params), [[] for _ in range(n)]
        self.prompt_logprobs[request_id] = []
        return request_id

    @rule(count=st.integers(1, 12))
    def step(self, count):
        for _ in range(count):
            self.take_in(self.engine.step())
            assert audit_books(self.engine) == []  # and the rest, which waits for the device, after the last one

    @rule(request_id=requests)
    def abort(self, request_id):
        output = self.engine.abort(request_id)
        if output is not None:
            reasons = {completion.finish_reason for completion in output.outputs}
            assert reasons <= {"abort", "stop"} if self.is_beam_search(request_id) else reasons == {"abort"}
            del self.asked[request_id]

    @rule(request_id=requests, index=st.integers(0, 3))
    def abort_a_part(self, request_id, index):
        if self.engine.has_request(request_id) and self.is_beam_search(request_id):
            with pytest.raises(ValueError, match="beam search"):
                self.engine.abort(request_id, index)
            return
        output = self.engine.abort(request_id, index)
        if output is not None:
            self.aborted.add((request_id, index))
            self.take_in([output])

    @rule(request_id=requests, index=st.none() | st.integers(0, 3))
    def abort_in_mid_step(self, request_id, index):
        if self.engine.has_request(request_id) and self.is_beam_search(request_id):
            index = None
        self.engine.runner.decoder.during_forward = lambda: self.engine.abort(request_id, index)
        if self.engine.has_request(request_id):
            self.aborted |= {(request_id, i) for i in range(4) if index in (None, i)}
        self.take_in(self.engine.step())
        self.engine.runner.decoder.during_forward = None

    @precondition(lambda self: self.engine.scheduler.running)
    @rule()
    def preempt(self):
        preempt(self.engine, self.engine.scheduler.running[-1])

    @rule()
    def trim(self):
        before = self.engine.stats()
        num_bytes = self.engine.trim()
        after = self.engine.stats()
        taken = before.kv_cache_bytes + before.swap_space_bytes - after.kv_cache_bytes - after.swap_space_bytes
        assert num_bytes == taken
        assert after.num_used_blocks == before.num_used_blocks
        assert after.num_swapped_blocks == before.num_swapped_blocks

    @rule()
    def reset_prefix_cache(self):
        self.engine.reset_prefix_cache()
        assert self.engine.stats().num_cached_blocks == 0

    @precondition(lambda self: self.engine.has_unfinished_requests())
    @rule(late=st.booleans())
    def fail_in_a_step(self, late):
        decoder = self.engine.runner.decoder
        if late and isinstance(decoder, LateDecoder):
            decoder.fail_late = RuntimeError("a kernel failed")
        else:
            decoder.fail = RuntimeError("a kernel failed")
        try:
            self.take_in(self.engine.step())
        except RuntimeError:
            for request_id in list(self.asked):
                if not self.engine.has_request(request_id):
                    del self.asked[request_id]
        decoder.fail = decoder.fail_late = None  # if nothing was launched

    @rule(short=st.booleans())
    def change_memory(self, short):
        self.engine.backend.out_of_memory = short
        self.engine.arena._retry_time = 0.0
        if self.engine.swap is not None:
            self.engine.swap_arena._retry_time = 0.0
        self.memory_was_short |= short

    @invariant()
    def books_balance(self):
        if not hasattr(self, "engine"):
            return
        audit(self.engine)
        scheduler = self.engine.scheduler
        if not self.by_priority:  # first come, first served, preempted or not
            order = [int(request.request_id) for request in [*scheduler.running, *scheduler.waiting]]
            assert order == sorted(order)

    def take_in(self, outputs):
        for output in outputs:
            prompt, params = self.asked[output.request_id]
            if isinstance(params, BeamSearchParams):
                self.take_in_beams(output, prompt, params)
                continue
            self.prompt_logprobs[output.request_id] += output.prompt_logprobs or []
            for completion in output.outputs:
                tokens = self.received[output.request_id][completion.index]
                tokens += completion.token_ids
                seed = None if params.seed is None else params.seed + completion.index
                expected = expected_output(
                    prompt,
                    params.max_tokens,
                    seed=seed,
                    ignore_eos=params.ignore_eos,
                    window=self.engine.model.sliding_window,
                )
                expected = expected[: self.engine.max_model_len - len(prompt)]
                assert tokens == expected[: len(tokens)]
                if completion.finish_reason == "error":
                    assert self.memory_was_short
                elif completion.finish_reason == "abort":
                    assert (output.request_id, completion.index) in self.aborted
                elif completion.finish_reason is not None:
                    assert tokens == expected
            if params.prompt_logprobs is not None and any(completion.token_ids for completion in output.outputs):
                prompt_logprobs, window = self.prompt_logprobs[output.request_id], self.engine.model.sliding_window
                assert_scored(prompt_logprobs, prompt, params.prompt_logprobs, window)
            if output.finished:
                del self.asked[output.request_id]

    def take_in_beams(self, output, prompt, params):
        assert output.finished
        del self.asked[output.request_id]
        reasons = {completion.finish_reason for completion in output.outputs}
        if "error" in reasons:
            assert self.memory_was_short
            return
        if (output.request_id, 0) in self.aborted:
            return
        assert reasons <= {"stop", "length"}
        window = self.engine.model.sliding_window or 0
        found, gap = beam_search(
            lambda token_ids: spread_logits(token_ids[-window:]),
            prompt,
            params.beam_width,
            min(params.max_tokens, self.engine.max_model_len - len(prompt)),
            stop_token_ids=() if params.ignore_eos else (EOS,),
            early_stopping=params.early_stopping,
        )
        if gap > MIN_GAP:
            assert [completion.token_ids for completion in output.outputs] == [f.token_ids for f in found]

    def is_beam_search(self, request_id):
        return isinstance(self.asked[request_id][1], BeamSearchParams)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        # Each step with something to do brings the first in service on by a token at least, or ends it. What is in
        # flight may have been launched before it came.
        while self.engine.has_unfinished_requests():
            first = min([*self.engine.scheduler.running, *self.engine.scheduler.waiting], key=lambda r: r.rank)
            sequences = first.unfinished
            before = sum(seq.num_cached_tokens for seq in sequences)
            for _ in range(1 + self.engine.pipeline.is_async):
                self.take_in(self.engine.step())
            assert sum(seq.num_cached_tokens for seq in sequences) > before or len(first.unfinished) < len(sequences)
            audit(self.engine)
        assert not self.asked
        assert self.engine.stats().num_used_blocks == 0
        assert self.engine.stats().num_swapped_blocks == 0


EngineWalk.TestCase.settings = settings(max_examples=NUM_WALKS, stateful_step_count=40, deadline=None)
test_random_walks = EngineWalk.TestCase
