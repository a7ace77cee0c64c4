"""`cupaged plot-trace`: block occupancy over time, from a trace."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("plot-trace")
@click.argument("trace", type=click.File("rb"), metavar="TRACE.json")
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False), metavar="OUT.png")
def plot_trace(trace, out: Path) -> None:
    """Plot TRACE.json, which `generate --trace` wrote, as OUT.png: KV blocks and sequences over time."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise click.ClickException("plot-trace needs matplotlib: pip install 'cupaged[plot]'") from None

    events = _counter_events(trace)
    block_times, blocks = _counters(trace.name, events, "KV blocks", ("used", "cached", "free"))
    times, sequences = _counters(trace.name, events, "sequences", ("running", "waiting"))
    figure = Figure(figsize=(10, 6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[2, 1])
    colours = ["tab:green", "tab:blue", "lightgrey"]
    top.stackplot(block_times, list(blocks.values()), labels=list(blocks), colors=colours, step="post")
    top.set_ylabel("KV blocks")
    for name, values in sequences.items():
        bottom.step(times, values, where="post", label=name)
    bottom.set_ylabel("sequences")
    bottom.set_xlabel("seconds")
    for axes in (top, bottom):
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper right")
    figure.savefig(out, dpi=150)
    click.echo(out)


def _counter_events(file) -> list[dict]:
    try:
        return [event for event in json.load(file)["traceEvents"] if event["ph"] == "C"]
    except (ValueError, TypeError, KeyError):
        raise click.UsageError(f"{file.name} is not a trace that `cupaged generate --trace` wrote") from None


def _counters(file_name: str, events: list[dict], name: str, series: tuple[str, ...]):
    """Times in seconds, and what the counter counted then by the names in `series`."""
    found = [event for event in events if event["name"] == name]
    if not found:
        raise click.UsageError(f"{file_name} has no step in it: nothing to plot")
    return [event["ts"] / 1e6 for event in found], {key: [event["args"][key] for event in found] for key in series}
