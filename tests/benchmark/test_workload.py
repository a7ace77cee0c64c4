"""Requests of given sizes: the same token ids everywhere, arrivals of a Poisson process."""

import json

import numpy as np
import pytest

from cupaged.benchmark.workload import Workload


def test_a_files_prompts_are_those_of_its_seed(tmp_path):
    file = tmp_path / "requests.json"
    file.write_text(json.dumps({"seed": 5, "requests": [{"prompt_len": 7, "output_len": 2}] * 3}))
    workload = Workload.read(file)
    assert workload.sizes == ((7, 2),) * 3
    assert (workload.num_prompt_tokens, workload.num_output_tokens) == (21, 6)
    expected = [np.random.default_rng([5, i]).integers(10, 300, size=7).tolist() for i in range(3)]
    assert workload.prompts(300) == expected
    assert workload.first(2).prompts(300) == expected[:2]


def test_no_two_turns_share_a_prompt():
    workload = Workload.uniform(4, prompt_len=8, output_len=1)
    prompts = [tuple(prompt) for turn in range(5) for prompt in workload.prompts(1000, turn)]
    assert len(set(prompts)) == 20
    assert all(10 <= token_id < 1000 for prompt in prompts for token_id in prompt)


def test_arrivals_are_a_poisson_process():
    arrivals = np.array(Workload.uniform(20_000, 1, 1, seed=3).arrivals(4.0))
    gaps = np.diff(arrivals, prepend=0)
    assert (gaps >= 0).all()
    # An exponential distribution's mean and standard deviation are equal; each is known to 1 % here.
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 4, rel=0.05)
    again, other = (Workload.uniform(5, 1, 1, seed).arrivals(4.0) for seed in (3, 4))
    assert again == arrivals[:5].tolist()
    assert other != again
