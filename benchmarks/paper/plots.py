"""The plots of docs/paper.md. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .simulation import PAGED, POLICIES


def plot_all(figures: dict[str, Any], folder: Path) -> None:
    """Write paper-latency.png and paper-memory.png into `folder`."""
    for name, plot in (("latency", plot_latency), ("memory", plot_memory)):
        figure = plot(figures)
        figure.tight_layout()
        figure.savefig(folder / f"paper-{name}.png", dpi=64, metadata={"Software": None})
        plt.close(figure)


def plot_latency(figures: dict[str, Any]) -> plt.Figure:
    """Mean and p99 of the normalised latency against the request rate."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for ax, (name, result) in zip(axes, figures["latency"].items(), strict=True):
        for i, policy in enumerate(POLICIES):
            curve = result["curves"][policy]
            rates = [point["rate"] for point in curve]
            for key, style in (("mean", "-o"), ("p99", ":")):
                label = f"{policy}, {key}"
                ax.plot(rates, [point[key] for point in curve], style, color=f"C{i}", markersize=3, label=label)
        ax.set(title=f"{name}, OPT-13B (model)", xlabel="requests/s", ylabel="s per output token", ylim=(0, 1))
        ax.legend(fontsize=7)
    return figure


def plot_memory(figures: dict[str, Any]) -> plt.Figure:
    """What the cache's slots hold while requests wait, and waste against block size."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    shares = figures["saturation"]["ShareGPT"]
    bottom = [0.0] * len(POLICIES)
    for key, label in (("filled", "tokens"), ("reserved", "for later tokens"), ("overreserved", "never needed")):
        heights = [100 * shares[policy][key] for policy in POLICIES]
        left.bar(POLICIES, heights, bottom=bottom, label=label)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    left.bar(POLICIES, [100 - below for below in bottom], bottom=bottom, color="lightgrey", label="free or rounding")
    left.set(title="KV cache slots, ShareGPT", ylabel="%")
    left.legend(fontsize=7)
    for name, by_size in figures["block_sizes"].items():
        right.plot(list(by_size), [100 * values["waste"] for values in by_size.values()], "-o", label=name)
    right.set(title=f"Unfilled slots, {PAGED}", xlabel="block size", ylabel="% of the blocks in use")
    right.legend(fontsize=7)
    return figure
