"""Random walks over the engine: add, step, abort, fail, run out of memory; every invariant after every step."""

from fake_model import VOCAB_SIZE, audit, expected_output, make_engine
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule

from cupaged.sampling_params import RequestOutputKind, SamplingParams


class EngineWalk(RuleBasedStateMachine):
    requests = Bundle("requests")

    @initialize(
        num_blocks=st.integers(3, 12),
        max_num_seqs=st.integers(1, 6),
        max_num_batched_tokens=st.integers(1, 40),
        preallocate=st.booleans(),
    )
    def start(self, **config):
        self.engine = make_engine(**config)
        self.asked = {}  # request id -> (prompt, params)
        self.received = {}  # request id -> tokens
        self.memory_was_short = False
        self.num_added = 0

    @rule(
        target=requests,
        length=st.integers(1, 40),
        first=st.integers(0, VOCAB_SIZE - 1),
        max_tokens=st.integers(1, 30),
        seed=st.none() | st.integers(0, 3),
        ignore_eos=st.booleans(),
    )
    def add(self, length, first, max_tokens, seed, ignore_eos):
        prompt = [(first + 3 * i) % VOCAB_SIZE for i in range(length)]
        params = SamplingParams(
            temperature=0 if seed is None else 1,
            seed=seed,
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            output_kind=RequestOutputKind.DELTA,
        )
        request_id = str(self.num_added)
        self.num_added += 1
        if length >= self.engine.max_model_len:
            try:
                self.engine.add_request(request_id, prompt, params)
            except ValueError:
                return multiple()
            raise AssertionError("a request that can't fit was taken in")
        self.engine.add_request(request_id, prompt, params)
        self.asked[request_id], self.received[request_id] = (prompt, params), []
        return request_id

    @rule(count=st.integers(1, 12))
    def step(self, count):
        for _ in range(count):
            self.take_in(self.engine.step())
            audit(self.engine)

    @rule(request_id=requests)
    def abort(self, request_id):
        output = self.engine.abort(request_id)
        if output is not None:
            assert output.outputs[0].finish_reason == "abort"
            del self.asked[request_id]

    @precondition(lambda self: self.engine.has_unfinished_requests())
    @rule()
    def fail_in_a_step(self):
        self.engine.runner.decoder.fail = RuntimeError("a kernel failed")
        try:
            self.take_in(self.engine.step())
        except RuntimeError:
            for request_id in list(self.asked):
                if not self.engine.has_request(request_id):
                    del self.asked[request_id]
        self.engine.runner.decoder.fail = None

    @rule(short=st.booleans())
    def change_memory(self, short):
        self.engine.backend.out_of_memory = short
        self.engine.arena._retry_time = 0.0
        self.memory_was_short |= short

    @invariant()
    def books_balance(self):
        if not hasattr(self, "engine"):
            return
        audit(self.engine)
        order = [
            int(request.request_id) for request in [*self.engine.scheduler.running, *self.engine.scheduler.waiting]
        ]
        assert order == sorted(order)  # first come, first served, preempted or not
        half_computed = [
            seq
            for request in self.engine.scheduler.running[:-1]
            for seq in request.active
            if seq.num_uncomputed_tokens > 1
        ]
        assert not half_computed

    def take_in(self, outputs):
        for output in outputs:
            completion = output.outputs[0]
            prompt, params = self.asked[output.request_id]
            tokens = self.received[output.request_id]
            tokens += completion.token_ids
            expected = expected_output(prompt, params.max_tokens, seed=params.seed, ignore_eos=params.ignore_eos)
            expected = expected[: self.engine.max_model_len - len(prompt)]
            assert tokens == expected[: len(tokens)]
            if output.finished:
                del self.asked[output.request_id]
                if completion.finish_reason == "error":
                    assert self.memory_was_short
                else:
                    assert tokens == expected

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        # Each step with something to do computes a token of the oldest request at least, or ends it.
        while self.engine.has_unfinished_requests():
            oldest = [*self.engine.scheduler.running, *self.engine.scheduler.waiting][0].sequences[0]
            before = oldest.num_cached_tokens
            self.take_in(self.engine.step())
            assert oldest.num_cached_tokens > before or oldest.finish_reason is not None
            audit(self.engine)
        assert not self.asked
        assert self.engine.stats().num_used_blocks == 0


EngineWalk.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
test_random_walks = EngineWalk.TestCase
