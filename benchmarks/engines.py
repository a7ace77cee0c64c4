"""Several engines in turn on the weights of one model: what the benchmarks beside this file share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cupaged import LLM
from cupaged.benchmark.environment import environment
from cupaged.engine.engine import Engine


@contextmanager
def engine_with(llm: LLM, **options) -> Iterator[Engine]:
    """An engine that computes with `llm`'s weights and buffers, with these options of EngineConfig instead of its own.
    Its cache is given back at the end."""
    first = llm.engine
    engine = Engine(replace(first.config, **options), first.model, first.runner.decoder, first.backend)
    try:
        yield engine
    finally:
        for request_id in list(engine._requests):
            engine.abort(request_id)
        engine.pipeline.settle()
        engine.arena.close()
        if engine.swap_arena is not None:
            engine.swap_arena.close()


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", required=True, help="benchmarks/configs/*.json, with --load-format dummy")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE")


class Report:
    """Figures by name. Whatever is added is printed and written at once: a run that is cut short leaves the rest."""

    def __init__(self, llm: LLM, arguments: argparse.Namespace):
        self._file = arguments.json
        self._content: dict[str, Any] = {
            "model": Path(arguments.model).stem,
            "load_format": arguments.load_format,
            "dtype": str(llm.engine.backend.dtype),
            "environment": environment(llm.engine.backend),
            "figures": {},
        }

    def add(self, name: str, figures: Any) -> None:
        print(name, json.dumps(figures, default=float), flush=True)
        self._content["figures"][name] = figures
        if self._file is not None:
            self._file.write_text(json.dumps(self._content, indent=1, default=float) + "\n", encoding="utf-8")
