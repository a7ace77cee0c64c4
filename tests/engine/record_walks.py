"""The random walks of test_state_machine.py, as many as it takes for so many steps, and a record of what happened.

    PYTHONPATH=tests python tests/engine/record_walks.py    # a million; writes benchmarks/results/random-walks.json

A step is one operation on the engine, after which all its invariants are checked. The first walk that finds something
ends the run with Hypothesis' shortest example of it, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

from engine.test_state_machine import EngineWalk
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import invariant, run_state_machine_as_test

from cupaged.backends.reference import ReferenceBackend
from cupaged.benchmark.environment import environment

REPORT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "random-walks.json"
WALKS_AT_A_TIME = 200
# Of EngineStats, what tells that the walks went where mistakes are made.
COUNTS = (
    "num_steps", "num_output_tokens", "num_cached_tokens", "num_copies", "num_evictions", "num_preemptions",
    "num_swaps", "num_tokens_lost",
)  # fmt: skip


counts, engine_counts = Counter(), Counter()


class CountedWalk(EngineWalk):
    @invariant()
    def count(self):
        counts["steps"] += 1

    def teardown(self):
        super().teardown()
        counts["walks"] += 1
        if hasattr(self, "engine"):
            stats = vars(self.engine.stats())
            engine_counts.update({name: stats[name] for name in COUNTS})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=REPORT)
    options = parser.parse_args()

    start, first_seed = time.monotonic(), options.seed
    while counts["steps"] < options.steps:
        walks = settings(
            max_examples=WALKS_AT_A_TIME,
            stateful_step_count=40,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        run_state_machine_as_test(seed(first_seed)(CountedWalk), settings=walks)
        first_seed += 1
        print(f"\r{counts['steps']:,} steps", end="", flush=True)
    print()
    report = {
        "what": "random walks over the engine, every invariant checked after each step; none was broken",
        "environment": environment(ReferenceBackend()),
        "seeds": [options.seed, first_seed - 1],
        "seconds": round(time.monotonic() - start),
        **counts,
        "in_the_engine": engine_counts,
    }
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
