"""Compute the paper's figures again.

    cd benchmarks && python -m paper [--report-only]

Writes benchmarks/results/paper.json and docs/paper.md and, if matplotlib can be
imported (the extra "plot"), docs/paper-*.png. Takes about two minutes on one core and needs no GPU. What paper.on_gpu
has measured (benchmarks/results/*-paper-*.json) gets a section of the document; --report-only writes the document anew
from the results that there are.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from .experiments import run_all
from .report import report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "paper.json"
DOCUMENT = ROOT / "docs" / "paper.md"


def read_measured() -> list[dict[str, Any]]:
    """What paper.on_gpu has written, in the order of the files' names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.parent.glob("*-paper-*.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report-only", action="store_true")
    if parser.parse_args().report_only:
        figures = json.loads(RESULTS.read_text(encoding="utf-8"))
        DOCUMENT.write_text(report(figures, read_measured()), encoding="utf-8")
        return
    # Six digits: enough for every use, and few enough that another NumPy writes the same file.
    figures = json.loads(json.dumps(run_all(), default=float), parse_float=lambda text: float(f"{float(text):.6g}"))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    DOCUMENT.write_text(report(figures, read_measured()), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        from .plots import plot_all

        plot_all(figures, DOCUMENT.parent)


if __name__ == "__main__":
    main()
