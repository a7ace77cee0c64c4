"""`cupaged bench`: speed and memory, as tables and as JSON."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cupaged.cli.options import add_options, engine_options, model_options, shape_options

if TYPE_CHECKING:
    from cupaged.benchmark.workload import Workload
    from cupaged.llm import LLM

Columns = Sequence[tuple[str, str]]  # of a table: header, key of the figures


class Counts(click.ParamType):
    """Whole numbers from 1, separated by commas."""

    name = "numbers"

    def convert(self, value, param, ctx) -> list[int]:
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r}: write whole numbers from 1, for example 1,8,64", param, ctx)
        return [int(part) for part in parts]


class Sequences(click.ParamType):
    """NUMBERxLENGTH, separated by commas; nothing for none."""

    name = "sizes"

    def convert(self, value, param, ctx) -> list[tuple[int, int]]:
        pairs = [part.split("x") for part in str(value).split(",") if part.strip()]
        if not all(len(pair) == 2 and all(n.strip().isdecimal() and int(n) > 0 for n in pair) for pair in pairs):
            self.fail(f"{value!r}: write sequences x tokens in each, for example 8x2048,1x32768", param, ctx)
        return [(int(pair[0]), int(pair[1])) for pair in pairs]


_COUNT = click.IntRange(min=1)
_JSON = click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Write the figures there, with device, driver, versions and commit.",
)
_REPEATS = click.option("--repeats", type=_COUNT, default=5, show_default=True, help="Runs that count.")
_WARMUP = click.option(
    "--warmup", type=click.IntRange(min=0), default=1, show_default=True, help="Runs before them that don't."
)
_SEED = click.option(
    "--seed", type=click.IntRange(min=0), help="Of the random token ids.  [default: the file's, else 0]"
)
_LOAD_FORMAT = click.option(
    "--load-format",
    type=click.Choice(["auto", "dummy"]),
    default="auto",
    show_default=True,
    help="dummy: random weights; the model may be a config.json alone.",
)
_ENGINE_LIMITS = [
    click.option("--max-num-seqs", type=_COUNT, default=256, show_default=True, help="Most sequences at once."),
    click.option(
        "--max-num-batched-tokens", type=_COUNT, default=2048, show_default=True, help="Most tokens of a step."
    ),
    click.option(
        "--long-prefill-token-threshold",
        type=_COUNT,
        default=64,
        show_default=True,
        help="Most of them of one prompt, while others decode.",
    ),
]
_WORKLOAD = [
    click.option(
        "--requests", type=click.Path(path_type=Path), metavar="FILE", help="A request file, as described below."
    ),
    click.option("--num-requests", type=_COUNT, help="[default: all of the file, else 64]"),
    click.option("--prompt-len", type=_COUNT, default=128, show_default=True, help="Without a file: tokens in."),
    click.option("--output-len", type=_COUNT, default=128, show_default=True, help="Without a file: tokens out."),
]
REQUEST_FILE = """
A request file is a JSON object {"seed": 0, "requests": [{"prompt_len": 155, "output_len": 84}, ...]}: for each request
how many tokens go in, and how many come out. The prompt of request i is
numpy.random.default_rng([seed, i]).integers(10, vocab_size, prompt_len), so that a file means the same prompts
everywhere; later repeats take seed + 1, seed + 2 and so on, lest cached prefixes help them.
"""


def _with(options: Sequence[Callable]) -> Callable[[Callable], Callable]:
    return lambda command: add_options(command, options)


def _all_engine_options(command: Callable) -> Callable:
    return add_options(engine_options(model_options(command)), [_LOAD_FORMAT, *_ENGINE_LIMITS])


@click.group()
def bench() -> None:
    """Measure speed and memory.

    Prompts are random token ids, outputs token ids of a fixed number, greedy. Figures are medians, with their extremes
    in brackets.
    """


@bench.command()
@click.option("--batch", "batches", type=Counts(), default="1", show_default=True, help="Sizes, for example 1,8,64.")
@click.option("--prompt-len", type=_COUNT, default=128, show_default=True)
@click.option("--output-len", type=click.IntRange(min=2), default=128, show_default=True)
@_with([_REPEATS, _WARMUP, _SEED, _JSON])
@_all_engine_options
@click.pass_context
def latency(
    ctx, batches, prompt_len, output_len, repeats, warmup, seed, json_file, model, load_format, **options
) -> None:
    """Time to the first token, and a decode step's, for batches of equal requests that start together."""
    from cupaged.benchmark import generation

    columns = [
        ("batch", "batch"),
        ("TTFT ms", "ttft_ms"),
        ("decode step ms", "decode_step_ms"),
        ("output tokens/s", "output_tokens_per_s"),
    ]
    with _report(ctx, json_file) as report, _load(report, model, load_format, options) as llm:
        report["figures"] = generation.latency(
            llm.engine,
            batches,
            prompt_len=prompt_len,
            output_len=output_len,
            repeats=repeats,
            warmup=warmup,
            seed=seed or 0,
            say=_say,
        )
        if llm.engine.backend.name == "cpu":
            columns.append(("in linear", "linear_share"))
        _show_figures(report, columns)
        _show_memory(report, llm)


@bench.command(epilog=REQUEST_FILE)
@_with([*_WORKLOAD, _REPEATS, _WARMUP, _SEED, _JSON])
@click.option("--n", type=_COUNT, default=1, show_default=True, help="Outputs of each prompt.")
@_all_engine_options
@click.pass_context
def throughput(
    ctx,
    n,
    requests,
    num_requests,
    prompt_len,
    output_len,
    repeats,
    warmup,
    seed,
    json_file,
    model,
    load_format,
    **options,
) -> None:
    """Tokens a second when all requests are there from the start."""
    from cupaged.benchmark import generation

    workload = replace(_workload(requests, num_requests, prompt_len, output_len, seed), n=n)
    with _report(ctx, json_file) as report, _load(report, model, load_format, options) as llm:
        report["figures"] = [generation.throughput(llm.engine, workload, repeats=repeats, warmup=warmup, say=_say)]
        _show_figures(
            report,
            [
                ("requests", "requests"),
                ("prompt tokens", "prompt_tokens"),
                ("output tokens", "output_tokens"),
                ("seconds", "seconds"),
                ("prompt tokens/s", "prompt_tokens_per_s"),
                ("output tokens/s", "output_tokens_per_s"),
            ],
        )
        _show_memory(report, llm)


@bench.command(epilog=REQUEST_FILE)
@click.option("--request-rate", type=float, required=True, help="Requests a second, on average.")
@_with([*_WORKLOAD, _SEED, _JSON])
@_all_engine_options
@click.pass_context
def serve(
    ctx, request_rate, requests, num_requests, prompt_len, output_len, seed, json_file, model, load_format, **options
) -> None:
    """Delays when requests come one by one, at random (a Poisson process): median / 99th percentile.

    Requests and engine share one process, without a server between them. ITL is the time between two tokens of a
    request; the normalised latency is a request's whole time over its output tokens.
    """
    from cupaged.benchmark import generation

    workload = _workload(requests, num_requests, prompt_len, output_len, seed)
    workload.arrivals(request_rate)  # which finds a bad rate before the model is loaded
    with _report(ctx, json_file) as report, _load(report, model, load_format, options) as llm:
        report["figures"] = [generation.serve(llm.engine, workload, request_rate=request_rate, say=_say)]
        _show_figures(
            report,
            [
                ("requests", "requests"),
                ("seconds", "seconds"),
                ("output tokens/s", "output_tokens_per_s"),
                ("TTFT ms", "ttft_ms"),
                ("ITL ms", "itl_ms"),
                ("normalised ms", "normalized_ms"),
            ],
        )
        _show_memory(report, llm)


@bench.command()
@_with([_REPEATS, _JSON])
@_all_engine_options
@click.pass_context
def startup(ctx, repeats, json_file, model, load_format, **options) -> None:
    """From the start of a process to its first token, with a cold and with a warm kernel cache.

    Seconds since the process was started until Python runs, cupaged is imported, the model is loaded, and one token
    of a prompt of 16 is there. The model must be there already; on the CPU no kernels are compiled, and there is one
    kind of start only.
    """
    from cupaged.benchmark.startup import startup as measure
    from cupaged.weights.hub import resolve

    path = resolve(model, offline=options["offline"], progress=_say).resolve()
    with _report(ctx, json_file) as report:
        figures, last = measure({"model": str(path), "load_format": load_format, **options}, repeats=repeats, say=_say)
        report |= {"model": {"name": path.name, "load_format": load_format}, **last, "figures": figures}
        _show_head(report)
        _show_figures(
            report,
            [
                ("kernel cache", "kernel_cache"),
                ("python s", "started_s"),
                ("imported s", "imported_s"),
                ("loaded s", "loaded_s"),
                ("first token s", "first_token_s"),
            ],
        )


@bench.command()
@click.option("--rows", type=Counts(), default="1,8,64,256,2048", show_default=True, help="Tokens of a step.")
@click.option(
    "--decode",
    type=Sequences(),
    default="1x512,8x2048,64x2048,256x2048,1x32768",
    show_default=True,
    help="Sequences x tokens in each, one more token for each.",
)
@click.option(
    "--prefill",
    type=Sequences(),
    default="1x2048,4x2048,1x8192",
    show_default=True,
    help="Sequences x tokens in each, all computed.",
)
@click.option("--only", multiple=True, metavar="FAMILY", help="Kernels of this family; may be given several times.")
@_with([_REPEATS, _JSON])
@shape_options
@click.pass_context
def kernels(ctx, rows, decode, prefill, only, repeats, json_file, model, device, dtype, block_size, offline) -> None:
    """Time each kernel on a GPU, in the shapes of a model of which no more than the config.json is read.

    GB/s and TFLOP/s count what an operation can't do without, bytes once each. "of ceiling" compares the bytes with
    what a kernel that only reads, or for kernels that write as well a device copy, gets in the same run. Arrays that
    a model wouldn't find in the L2 cache are out of it here too. "host us" is what Python takes for a launch.
    """
    from cupaged.backends.select import choose_device, choose_dtype, open_backend
    from cupaged.benchmark.environment import environment, memory
    from cupaged.benchmark.kernel_cases import FAMILIES, KernelCases
    from cupaged.config import EngineConfig
    from cupaged.errors import DeviceError
    from cupaged.weights.dummy import read_config
    from cupaged.weights.hub import resolve

    if unknown := set(only) - set(FAMILIES):
        raise click.UsageError(f"--only: no kernels are called {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    EngineConfig(dtype=dtype, block_size=block_size)  # which refuses bad ones
    path = resolve(model, offline=offline, progress=_say)
    config = read_config(path)
    use_cuda, why = choose_device(device)
    if not use_cuda:
        raise DeviceError(f"bench kernels times the CUDA kernels, but this would run on the CPU, {why}")
    from cupaged.benchmark.kernel_timing import GraphTimer, measure_ceilings, time_cases

    backend, timer = open_backend(use_cuda, choose_dtype(dtype, config.dtype, use_cuda)), GraphTimer(repeats)
    with _report(ctx, json_file) as report:
        report |= {
            "model": {"name": path.name, "dtype": str(backend.dtype)},
            "environment": environment(backend),
        }
        cases = KernelCases(
            backend, config, block_size=block_size, l2_bytes=timer.l2_bytes, rows=rows, decode=decode, prefill=prefill
        )
        report["ceilings_gb_per_s"] = measure_ceilings(backend, timer)
        makers = [(family, make) for family, make in cases.makers() if not only or family in only]
        report["figures"] = time_cases(makers, timer, report["ceilings_gb_per_s"], _say)
        report["memory"] = memory(backend)
        _show_head(report)
        click.echo("ceilings: " + ", ".join(f"{k} {v:,.0f} GB/s" for k, v in report["ceilings_gb_per_s"].items()))
        _show_figures(
            report,
            [
                ("kernel", "family"),
                ("shape", "shape"),
                ("us", "us"),
                ("host us", "host_us"),
                ("GB/s", "gb_per_s"),
                ("of ceiling", "of_ceiling"),
                ("", "ceiling"),
                ("TFLOP/s", "tflop_per_s"),
            ],
        )


# -- what they share ---------------------------------------------------------------------------------------------


def _say(line: str) -> None:
    click.echo(line, err=True)


def _workload(requests, num_requests, prompt_len, output_len, seed) -> Workload:
    from cupaged.benchmark.workload import Workload

    if requests is None:
        return Workload.uniform(num_requests or 64, prompt_len, output_len, seed or 0)
    workload = Workload.read(requests)
    workload = workload if num_requests is None else workload.first(num_requests)
    return workload if seed is None else replace(workload, seed=seed)


@contextmanager
def _report(ctx: click.Context, json_file: Path | None) -> Iterator[dict[str, Any]]:
    """A report to fill in; it is written when all is well."""
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise click.UsageError(f"--json: there is no directory {json_file.absolute().parent}")
    options = {name: str(value) if isinstance(value, Path) else value for name, value in ctx.params.items()}
    report = {"benchmark": ctx.command.name, "options": options}
    yield report
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")


@contextmanager
def _load(report: dict[str, Any], model: str | None, load_format: str, options: dict[str, Any]) -> Iterator[LLM]:
    """The model, loaded; the report gets what is known before anything is measured."""
    from cupaged.benchmark.environment import environment
    from cupaged.llm import LLM
    from cupaged.weights.hub import resolve
    from cupaged.weights.packing import parameter_bytes

    path = resolve(model, offline=options["offline"], progress=_say)
    with LLM(path, load_format=load_format, **options) as llm:
        gc.freeze()  # or else each full collection looks at all that is loaded, 20 ms of a step
        engine = llm.engine
        report["model"] = {
            "name": path.name,
            "load_format": load_format,
            "architecture": engine.model.architecture,
            "dtype": str(engine.backend.dtype),
            "weights_bytes": parameter_bytes(engine.model, engine.backend.dtype),
            "max_model_len": engine.max_model_len,
        }
        report["environment"] = environment(engine.backend)
        _show_head(report)
        yield llm


def _show_head(report: dict[str, Any]) -> None:
    environment, model = report["environment"], report["model"]
    click.echo(f"device: {environment.get('gpu') or environment['device']}; load {environment['load_average'][0]}")
    click.echo(f"model:  {model['name']}" + (f", {model['dtype']}" if "dtype" in model else ""))
    click.echo(f"commit: {environment['commit'] or 'unknown'}, cupaged {environment['cupaged']}")


def _show_figures(report: dict[str, Any], columns: Columns) -> None:
    from cupaged.benchmark.figures import table

    click.echo(table(columns, report["figures"]))


def _show_memory(report: dict[str, Any], llm: LLM) -> None:
    from cupaged.benchmark.environment import memory
    from cupaged.memory.budget import format_bytes

    report["memory"] = memory(llm.engine.backend)
    report["engine"] = asdict(llm.engine.stats())
    names = {"peak_rss_bytes": "process", "pool_bytes": "GPU pool"}
    parts = [f"{names[name]} {format_bytes(count)}" for name, count in report["memory"].items()]
    click.echo(f"memory: {', '.join(parts)} at most; weights {format_bytes(report['model']['weights_bytes'])}")
    for line in llm.stats_lines():
        click.echo(line)
