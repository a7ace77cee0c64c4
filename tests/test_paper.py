"""The PagedAttention paper's main figures from short traces; docs/paper.md has the full ones, by benchmarks/paper."""

import json
from pathlib import Path

import numpy as np
import pytest
from fake_model import make_engine, model_with
from paper.__main__ import read_measured
from paper.beams import StandInModel, beam_sharing
from paper.contiguous import RESERVATIONS, BuddyAllocator, ContiguousBlocks
from paper.experiments import CONFIDENCE, shared_prefix
from paper.report import report
from paper.simulation import BLOCK_SIZE, NUM_SLOTS, PAGED, Simulation
from paper.step_time import A100_13B, UNIT
from paper.traces import ALPACA, MAX_LEN, SHAREGPT

from cupaged.benchmark.workload import Workload
from cupaged.sampling_params import SamplingParams

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("lengths", [SHAREGPT, ALPACA], ids=lambda lengths: lengths.name)
def test_traces_have_the_stated_means_after_clipping(lengths):
    sizes = np.array(lengths.workload(500).sizes)
    assert sizes.mean(axis=0) == pytest.approx([lengths.mean_prompt, lengths.mean_output], rel=0.01)
    assert sizes.min() >= 1
    assert sizes.sum(axis=1).max() <= MAX_LEN


def test_buddy_allocator_against_a_map_of_slots():
    rng = np.random.default_rng(0)
    allocator, owners, regions = BuddyAllocator(1000), np.zeros(1000, int), {}
    for i in range(1, 2000):
        if regions and rng.random() < 0.5:
            key = list(regions)[rng.integers(len(regions))]
            start, size = regions.pop(key)
            assert (owners[start : start + size] == key).all()
            owners[start : start + size] = 0
            allocator.free(start, size)
        else:
            wanted = int(rng.integers(1, 200))
            region = allocator.allocate(wanted)
            if region is None:  # no aligned region of that size is free
                size = 1 << (wanted - 1).bit_length()
                assert all(owners[start : start + size].any() for start in range(0, 1000 - size + 1, size))
                continue
            start, size = region
            assert wanted <= size < 2 * wanted
            assert start % size == 0
            assert not owners[start : start + size].any()
            owners[start : start + size], regions[i] = i, region
    for region in regions.values():
        allocator.free(*region)
    assert allocator.allocate(512) == (0, 512)  # all have merged again


def test_a_region_is_kept_to_the_end_and_given_back():
    simulation = Simulation("Oracle", UNIT, num_slots=64)
    assert isinstance(simulation.blocks, ContiguousBlocks)
    run = simulation.run(Workload(((10, 20), (10, 20), (10, 20))))  # 30 slots each, so regions of 32: two at a time
    assert run.num_steps == 40
    # The first two take a step for the prompt and one for each further token, the third as long after them.
    assert run.normalized_latency.tolist() == [1.0, 1.0, 2.0]


def test_simulation_takes_the_engines_steps():
    """The same requests through Engine: as many steps, copies and preemptions, and the same sharing and waste."""
    sizes = tuple(zip([5, 17, 30, 8, 24, 40], [30, 12, 25, 40, 9, 33], strict=True))
    num_blocks, block_size, n = 48, 8, 3
    engine = make_engine(num_blocks, block_size=block_size, enable_prefix_caching=False, model=model_with())
    for i, (num_prompt, num_output) in enumerate(sizes):
        params = SamplingParams(n=n, temperature=1, seed=i, max_tokens=num_output, ignore_eos=True)
        engine.add_request(str(i), [1] * num_prompt, params)
    while engine.has_unfinished_requests():
        engine.step()
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_copies > 0

    simulation = Simulation(PAGED, UNIT, num_slots=num_blocks * block_size, block_size=block_size, warm_up=None)
    run = simulation.run(Workload(sizes, n=n))

    assert (run.num_steps, run.num_copies, run.num_preemptions) == (
        stats.num_steps, stats.num_copies, stats.num_preemptions
    )  # fmt: skip
    assert run.means.sharing == pytest.approx(stats.mean_sharing)
    assert run.means.waste == pytest.approx(stats.mean_waste)


@pytest.fixture(scope="module")
def saturated():
    """Means of each policy on ShareGPT's lengths while requests wait."""
    workload = SHAREGPT.workload(300)
    return {policy: Simulation(policy, A100_13B).run(workload).means for policy in (*RESERVATIONS, PAGED)}


def test_paging_fills_the_cache_and_reservations_do_not(saturated):
    """Figure 2: 96.3 % against 20.4, 26.8 and 38.2 %."""
    filled = {policy: means.mean("filled") / NUM_SLOTS for policy, means in saturated.items()}
    assert 1 - saturated[PAGED].waste > 0.97
    assert filled[PAGED] > 0.93
    assert filled["Max"] == pytest.approx(0.204, abs=0.03)
    assert filled["Pow2"] == pytest.approx(0.268, abs=0.04)
    assert filled["Oracle"] == pytest.approx(0.382, abs=0.04)


def test_requests_in_the_batch(saturated):
    """Figure 13: 7.00, 9.81 and 13.62. Paging's 30.42 was below saturation."""
    requests = {policy: means.mean("requests") for policy, means in saturated.items()}
    assert requests["Max"] == pytest.approx(7.00, abs=0.01)
    assert requests["Pow2"] == pytest.approx(9.81, rel=0.12)
    assert requests["Oracle"] == pytest.approx(13.62, rel=0.12)
    assert 30 < requests[PAGED] < 42


def test_throughput_over_reservations(saturated):
    """Figure 12: 1.7 to 2.7 times Oracle's and 2.7 to 8 times Max's, in the model of the step's time."""
    throughput = {policy: means.throughput for policy, means in saturated.items()}
    assert 1.6 < throughput[PAGED] / throughput["Oracle"] < 2.7
    assert 2.7 < throughput[PAGED] / throughput["Max"] < 8


@pytest.mark.parametrize(
    ("lengths", "num_requests", "paper"),
    [(ALPACA, 500, {2: 0.0609, 4: 0.0853, 6: 0.0979}), (SHAREGPT, 200, {2: 0.162, 6: 0.305})],
    ids=["Alpaca", "ShareGPT"],
)
def test_memory_saved_by_parallel_sampling(lengths, num_requests, paper):
    """Figure 15 (a), and a formula: n - 1 outputs out of n need no blocks of their own for the prompt's full ones."""
    for n, saved in paper.items():
        workload = lengths.workload(num_requests, n=n)
        run = Simulation(PAGED, UNIT, num_slots=10 * NUM_SLOTS, warm_up=None).run(workload)
        shared = sum((n - 1) * (prompt // BLOCK_SIZE) * output for prompt, output in workload.sizes)
        lengths_in_steps = [prompt + i for prompt, output in workload.sizes for i in range(output)]
        blocks = n * sum(-(-length // BLOCK_SIZE) for length in lengths_in_steps)
        # Besides, the prompt's last block is shared for the step in which the outputs fork.
        assert shared / blocks <= run.means.sharing <= shared / blocks + 0.005
        assert run.means.sharing == pytest.approx(saved, abs=0.02)


def test_memory_saved_by_beam_search():
    """Figure 15 (b), Alpaca. Width 2 is what the stand-in's confidence was chosen by."""
    for width, saved in {2: 0.3756, 4: 0.5313, 6: 0.5516}.items():
        assert beam_sharing(ALPACA.workload(100), width, StandInModel(CONFIDENCE)) == pytest.approx(saved, abs=0.05)


def test_shared_prefix_over_oracle():
    """Figure 16: 1.67 times with 80 tokens and 3.58 times with 341; the second comes out lower here."""
    for num_tokens, low, high in ((80, 1.4, 1.8), (341, 2.5, 3.6)):
        result = shared_prefix(num_tokens, 600)
        assert low < result[PAGED]["throughput"] / result["Oracle"]["throughput"] < high


def test_document_shows_the_results():
    figures = json.loads((ROOT / "benchmarks/results/paper.json").read_text())
    assert (ROOT / "docs/paper.md").read_text() == report(figures, read_measured())
