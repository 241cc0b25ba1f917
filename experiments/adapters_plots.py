"""Tables and panels that the experiments about LoRA generators share: adapters by split, as their judging found them."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from experiments.common import Results, cell, markdown

SPLITS = {"seen": "seen conditions", "held_out_slice": "held-out slices", "held_out_source": "held-out sources"}
METRICS = {
    "nll": ("nats a token", ".4f"),
    "share": ("share of the teachers' gain", ".3f"),
    "share_mean": ("mean of the conditions' shares", ".3f"),
    "delta_cosine": ("cosine to the teacher's delta, fresh probes", ".3f"),
    "delta_ratio": ("size of the delta over the teacher's", ".2f"),
    "size_ratio": ("size of dW over the teacher's", ".2f"),
}
"""What a judging measures: its words and the form of its numbers."""
GAIN = "gain"
"""Nats a token below the base: for panels, where the splits' own losses would lie far apart."""


def folder(here: Path) -> Path:
    """Where `results.json` lies and the drawing goes: beside the script, or the folder named on the command line."""
    return Path(sys.argv[1]) if sys.argv[1:] else here


def splits(results: Results) -> list[str]:
    """Those that were judged."""
    return [split for split in SPLITS if any(setting.startswith(f"{split}: ") for setting in results.settings())]


def columns(results: Results, split: str) -> list[str]:
    """The adapters judged on a split, in the order in which they were written."""
    mark = f"{split}: "
    return [setting.removeprefix(mark) for setting in results.settings() if setting.startswith(mark)]


def tables(results: Results, metrics: Sequence[str] = tuple(METRICS)) -> str:
    """A table for each split: a line an adapter, mean and range over seeds."""
    found = []
    for split in splits(results):
        head = [SPLITS[split], *(METRICS[metric][0] for metric in metrics)]
        lines = [[name, *(cell(results.values(f"{split}: {name}", m), METRICS[m][1]) for m in metrics)] for name in columns(results, split)]
        found.append(markdown(head, lines))
    return "\n\n".join(found)


def spread(found: Sequence[Sequence[float]]) -> tuple[list[float], list[list[float]]]:
    """Means, and how far the least and the largest lie from them, as error bars want it."""
    means = [statistics.mean(values) for values in found]
    return means, [[m - min(v) for m, v in zip(means, found, strict=True)], [max(v) - m for m, v in zip(means, found, strict=True)]]


def points(axis: Any, places: Sequence[float], found: Sequence[Sequence[float]], **looks: Any) -> None:
    """Means with the range over seeds as bars, one line of the panel each; what was not measured is left out."""
    kept = [(place, values) for place, values in zip(places, found, strict=True) if values]
    means, bars = spread([values for _, values in kept])
    axis.errorbar(means, [place for place, _ in kept], xerr=bars, capsize=2, **looks)


def numbers(results: Results, split: str, name: str, metric: str) -> list[float]:
    """One number a seed of an adapter on a split."""
    if metric != GAIN:
        return results.values(f"{split}: {name}", metric)
    base, own = (results.values(f"{split}: {column}", "nll") for column in ("base", name))
    return [b - o for b, o in zip(base, own, strict=True)]


def panels(
    results: Results, metrics: Sequence[str], path: Path, leave_out: Mapping[str, Sequence[str]] | None = None, *, wide: Mapping[str, float] | None = None
) -> None:
    """A panel a metric, a line an adapter, a mark a split.

    ``leave_out`` names adapters that say nothing in a metric's panel; ``wide`` gives the linear part of an axis that is logarithmic
    beyond it on both sides.
    """
    judged, left = splits(results), leave_out or {}
    order = [name for name in columns(results, judged[0]) if any(name not in left.get(metric, ()) for metric in metrics)][::-1]
    figure, axes = plt.subplots(1, len(metrics), figsize=(1.8 + 3.4 * len(metrics), 1.4 + 0.32 * len(order)), sharey=True, squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        for number, (split, marker) in enumerate(zip(judged, cycle("osD"), strict=False)):
            found = [[] if name in left.get(metric, ()) else numbers(results, split, name, metric) for name in order]
            shift = 0.2 * ((len(judged) - 1) / 2 - number)
            points(axis, [place + shift for place in range(len(order))], found, fmt=marker, markersize=4, label=SPLITS[split])
        axis.set(xlabel="nats a token below the base" if metric == GAIN else METRICS[metric][0])
        if metric in (wide or {}):
            axis.set_xscale("symlog", linthresh=(wide or {})[metric])
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(order)), order)
    axes[0][0].set_ylim(-0.6, len(order) - 0.4)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=len(judged), loc="upper center")
    finish(figure, path, top=1 - 0.35 / figure.get_figheight())


def rates(results: Results) -> str:
    """The learning rates that were chosen."""
    mark = "learning rate of "
    arms = [setting.removeprefix(mark) for setting in results.settings() if setting.startswith(mark)]
    return markdown(["arm", "learning rate"], [[arm, cell(results.values(mark + arm, "lr"), "g")] for arm in arms])


def finish(figure: Any, path: Path, *, top: float = 1.0, bottom: float = 0.0) -> None:
    """Save without the date, so that equal numbers give equal files; ``top`` and ``bottom`` leave room for a legend."""
    figure.tight_layout(rect=(0, bottom, 1, top))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
