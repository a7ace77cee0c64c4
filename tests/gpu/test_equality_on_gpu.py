"""The same request gives the same tokens and log probabilities on a GPU, within bfloat16's error, however it is run:
tests/model/test_sharing_models.py on the CUDA backend, and beam searches.

Each output is held against float32's logits after the very tokens that it consists of, computed at once and without
engine or GPU: its log probabilities must be near, and each token must be the one that these logits give, but where the
choice hangs on less than bfloat16's error. What that error is, a plain implementation tells that rounds as much.
"""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import model_tools
import numpy as np
import pytest
from model.conftest import Driver
from model.test_beam_models import STOPS
from model.test_sharing_models import (  # tests are collected here as well, to run with the fixtures below
    prompt_of,
    run,
    test_a_prefix_that_is_found_at_every_length_of_a_prompt,  # noqa: F401
    test_a_request_alone_and_beside_63_others,  # noqa: F401
    test_class_24_hits_in_chunks_of_any_size,  # noqa: F401
    test_forced_preemption_every_few_steps,  # noqa: F401
    test_n_outputs_are_those_of_n_requests,  # noqa: F401
)
from model_tools import RoundingBackend, golden, new_driver

from cupaged.backends.cuda import open_cuda, probe
from cupaged.backends.reference import ReferenceBackend
from cupaged.backends.sampling_reference import philox_u64
from cupaged.engine.beam_search import BeamSearch
from cupaged.kernels.checks import BFLOAT16
from cupaged.sampling_params import BeamSearchParams

FOUND = probe()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not FOUND.usable, reason=f"needs a GPU: {FOUND.text}")]

EOS = 2
LEAST_LOGPROB = -10  # what is less likely is not looked at
# (model, enforce_eager, async_scheduling): mistral has a sliding window
WAYS = [("mistral", True, False), ("mistral", False, True), ("qwen3", False, False), ("qwen3", True, True)]
WAY_NAMES = ["mistral", "mistral-graphs-async", "qwen3-graphs", "qwen3-async"]


@pytest.fixture(scope="module", params=WAYS, ids=WAY_NAMES)
def way(request):
    return request.param


@pytest.fixture
def new_engine(way):
    name, enforce_eager, async_scheduling = way
    engines = []

    def new(*, max_num_batched_tokens=256, num_blocks=64, **options):
        sizes = {"max_num_tokens": max_num_batched_tokens, "num_blocks": num_blocks, "max_model_len": 120}
        engine = model_tools.new_engine(
            name, open_cuda(BFLOAT16), **sizes, **options, debug=True, enforce_eager=enforce_eager,
            async_scheduling=async_scheduling,
        )  # fmt: skip
        engines.append(engine)
        return engine

    yield new
    for engine in engines:
        assert engine.audit() == []
        assert engine.stats().num_used_blocks == 0
        engine.close()


# -- the oracle ------------------------------------------------------------------------------------------------


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of rows, in float64."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@functools.cache
def drivers(name: str) -> tuple[Driver, Driver]:
    return new_driver(name, ReferenceBackend()), new_driver(name, RoundingBackend(BFLOAT16))


@functools.cache
def expected(name: str, token_ids: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """After each of the tokens: float32's log probabilities [tokens, vocab_size], and how much a plain implementation
    in bfloat16 errs [tokens]: in one of the likelier log probabilities at most, and in a sum of the probabilities of a
    token and all before it."""
    results = []
    for driver in drivers(name):
        sequence = driver.new_sequence()
        results.append(log_softmax(driver.step((sequence, list(token_ids)), all_logits=True)[0]))
        driver.finish(sequence)
    exact, rounded = results
    errors = np.where(exact > LEAST_LOGPROB, np.abs(rounded - exact), 0)
    sum_errors = np.exp(rounded).cumsum(axis=1) - np.exp(exact).cumsum(axis=1)
    return exact, errors.max(axis=1), np.abs(sum_errors).max(axis=1)


@functools.cache
def usual_errors(name: str) -> tuple[float, float]:
    """Which of these errors one row in a hundred exceeds."""
    rows = [expected(name, tuple(prompt_of(100, salt)))[1:] for salt in range(20)]
    return tuple(float(np.percentile(np.concatenate(errors), 99)) for errors in zip(*rows, strict=True))


def tolerances(name: str, token_ids: tuple[int, ...]) -> np.ndarray:
    """[2, tokens]: of `expected`'s two errors three times what is usual, or this very row's. Other orders of sums have
    other errors."""
    _, *errors = expected(name, token_ids)
    return 3 * np.maximum(errors, np.array(usual_errors(name))[:, None])


@pytest.fixture
def assert_right(way):
    """assert_right(prompt, params, output), as tests/model has it."""
    name = way[0]

    def assert_right(prompt, params, output):
        assert [completion.index for completion in output.outputs] == list(range(params.n))
        for completion in output.outputs:
            token_ids = completion.token_ids
            assert len(token_ids) == params.max_tokens
            context, first = (*prompt, *token_ids[:-1]), len(prompt) - 1
            rows = zip(expected(name, context)[0][first:], *tolerances(name, context)[:, first:], strict=True)
            for counter, (exact, tolerance, sum_tolerance) in enumerate(rows):
                token_id, entries = token_ids[counter], completion.logprobs[counter]
                for other, entry in entries.items():
                    assert abs(entry.logprob - exact[other]) <= tolerance or exact[other] < LEAST_LOGPROB
                if params.temperature == 0:
                    assert exact[token_id] >= exact.max() - tolerance
                    continue
                # A draw takes the token at which the sum of the probabilities passes a point.
                sums = np.exp(log_softmax(exact / params.temperature)).cumsum()
                point = philox_u64(params.seed + completion.index, counter) / 2**64
                sum_tolerance /= min(params.temperature, 1)
                begin = sums[token_id - 1] if token_id > 0 else 0.0
                assert begin - sum_tolerance <= point < sums[token_id] + sum_tolerance

    return assert_right


# -- beams -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preempt_every", [0, 3])
def test_beam_searches_of_widths_2_to_8(way, new_engine, monkeypatch, preempt_every):
    """All at once, of prompts that share their beginnings. In each step the continuations that are taken have the
    largest sums of float32's log probabilities, or nearly; and so have the outputs."""
    name, prompts = way[0], golden(way[0])["prompts"]
    steps, choose = [], BeamSearch.choose

    def recorded(search, beams, token_ids, logprobs):
        survivors, finished = choose(search, beams, token_ids, logprobs)
        outputs = {id(beam): tuple(beam.token_ids[beam.num_prompt_tokens :]) for beam in beams}
        taken = [[(*outputs[id(c.beam)], c.token_id) for c in part] for part in (survivors, finished)]
        alive = [outputs[id(beam)] for beam in beams if beam.cumulative_logprob > -math.inf]
        steps.append((beams[0].request.request_id, alive, *taken))
        return survivors, finished

    monkeypatch.setattr(BeamSearch, "choose", recorded)
    requests = {}
    engine = new_engine(max_num_seqs=64, num_blocks=512, max_num_batched_tokens=128)
    for i in range(14):
        width = 2 + i % 7
        kinds = ({"stop_token_ids": STOPS}, {"stop_token_ids": STOPS, "length_penalty": 0.5}, {"ignore_eos": True})
        params = BeamSearchParams(width, 10, logprobs=1, **kinds[i % 3])
        requests[str(i)] = (prompts[1 + i % 4], params)
        engine.add_request(str(i), *requests[str(i)])
    outputs = run(engine, preempt_every=preempt_every)
    assert (engine.stats().num_preemptions > 0) == (preempt_every > 0)
    assert engine.stats().num_copies > 0
    monkeypatch.undo()

    def logprobs_of(request_id, output):
        """The sum of its tokens' log probabilities, how far off that may be, and what comes after it."""
        context, first = (*requests[request_id][0], *output), len(requests[request_id][0]) - 1
        exact, tolerance = expected(name, context)[0][first:], tolerances(name, context)[0][first:]
        total = exact[range(len(output)), list(output)].sum()
        return total, float(np.sqrt(np.square(tolerance).sum())), exact[-1]

    found = {request_id: set() for request_id in requests}
    for request_id, alive, survivors, finished in steps:
        params = requests[request_id][1]
        sums, tolerance = {}, 0.0
        for output in alive:
            so_far, error, after = logprobs_of(request_id, output)
            tolerance = max(tolerance, 2 * error)
            sums |= {(*output, token_id): so_far + logprob for token_id, logprob in enumerate(after)}
        taken = [*survivors, *finished]
        ends = {EOS, *params.stop_token_ids} if not params.ignore_eos else set()
        is_last = len(taken[0]) == params.max_tokens
        lowest = min(sums[output] for output in survivors or finished)
        ranked = sorted(sums.values(), reverse=True)
        last_kept, first_left = ranked[params.beam_width - 1 : params.beam_width + 1]
        for output, total in sums.items():
            if not is_last and output[-1] not in ends:
                assert output not in finished
                assert output in survivors or total <= lowest + tolerance
            else:  # kept when it is among the best beam_width
                assert output not in survivors
                assert total >= last_kept - tolerance if output in finished else total <= first_left + tolerance
        found[request_id] |= set(finished)

    for request_id, (_, params) in requests.items():
        completions = outputs[request_id].outputs
        assert len(completions) == params.beam_width
        scores, tolerance = [], 0.0
        for completion in completions:
            output, length = tuple(completion.token_ids), len(completion.token_ids)
            assert output in found[request_id]
            total, error, _ = logprobs_of(request_id, output)
            assert abs(completion.cumulative_logprob - total) <= error
            scores.append(total / length**params.length_penalty)
            tolerance = max(tolerance, 2 * error / length**params.length_penalty)
        assert all(a >= b - tolerance for a, b in pairwise(scores))
        for output in found[request_id] - {tuple(completion.token_ids) for completion in completions}:
            total, error, _ = logprobs_of(request_id, output)
            assert total / len(output) ** params.length_penalty <= scores[-1] + tolerance
