"""Compute the paper's figures again.

    cd benchmarks && python -m paper

Writes benchmarks/results/paper.json and docs/paper.md and, if matplotlib can be
imported (the extra "plot"), docs/paper-*.png. Takes about two minutes on one core and needs no GPU.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from .experiments import run_all
from .report import report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "paper.json"
DOCUMENT = ROOT / "docs" / "paper.md"


def main() -> None:
    # Six digits: enough for every use, and few enough that another NumPy writes the same file.
    figures = json.loads(json.dumps(run_all(), default=float), parse_float=lambda text: float(f"{float(text):.6g}"))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    DOCUMENT.write_text(report(figures), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        from .plots import plot_all

        plot_all(figures, DOCUMENT.parent)


if __name__ == "__main__":
    main()
