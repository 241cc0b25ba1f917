"""Draw `ablations.svg` and print the README's tables from `results.json`.

python experiments/ablations/plot.py [FOLDER]
"""

from __future__ import annotations

import statistics
import sys
from itertools import cycle
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.adapters_plots import SPLITS, finish, folder, plt, spread  # noqa: E402
from experiments.common import Results, cell, markdown  # noqa: E402

STYLES = ("-", "--", ":")
MARK = " x "


def axes_of(results: Results) -> tuple[list[str], list[str], list[str]]:
    """Weights, numbers of probes and readings, each in the order of the grid."""
    cells = [setting.split(MARK) for setting in results.settings() if MARK in setting]
    weights, probes, readings = (list(dict.fromkeys(words)) for words in zip(*cells, strict=True))
    return weights, sorted(probes, key=lambda words: int(words.split()[0])), readings


def judged(results: Results) -> list[str]:
    """Splits on whose test text the cells were judged."""
    return [split for split in SPLITS if results.values("base", f"nll, {split}")]


def draw(results: Results, path: Path) -> None:
    """A panel a split: loss against the delta's weight, a colour a reading, a stroke a number of probes; bars span the seeds."""
    weights, probes, readings = axes_of(results)
    splits = judged(results)
    figure, axes = plt.subplots(1, len(splits), figsize=(5 * len(splits), 4.6), squeeze=False)
    for axis, split in zip(axes[0], splits, strict=True):
        for colour, reading in enumerate(readings):
            for number, (count, style) in enumerate(zip(probes, cycle(STYLES), strict=False)):
                found = [results.values(MARK.join((weight, count, reading)), f"nll, {split}") for weight in weights]
                means, bars = spread(found)
                places = [k + 0.04 * (len(probes) * colour + number) for k in range(len(weights))]
                label = f"{reading}, {count}"
                axis.errorbar(places, means, yerr=bars, color=f"C{colour}", linestyle=style, marker="o", markersize=3, capsize=1, elinewidth=0.5, label=label)
        axis.axhline(statistics.mean(results.values("base", f"nll, {split}")), color="grey", linestyle="--", linewidth=0.8)
        axis.set(title=f"{SPLITS[split]} (dashed: the base)", xlabel="weight of the delta", ylabel="nats a token")
        axis.set_xticks(range(len(weights)), weights)
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=3, loc="lower center", fontsize="small")
    finish(figure, path, bottom=0.02 + 0.045 * -(-len(labels) // 3))


def tables(results: Results) -> str:
    """A table a split: a line a reading and number of probes, a column a weight."""
    weights, probes, readings = axes_of(results)
    found = []
    for split in judged(results):
        lines = [
            [f"{reading}, {count}", *(cell(results.values(MARK.join((weight, count, reading)), f"nll, {split}"), ".4f") for weight in weights)]
            for reading in readings
            for count in probes
        ]
        known = ", ".join(f"{name} {cell(results.values(name, f'nll, {split}'), '.4f')}" for name in ("base", "teacher"))
        found.append(markdown([f"{SPLITS[split]}: nats a token ({known})", *weights], lines))
    return "\n\n".join(found)


if __name__ == "__main__":
    place = folder(HERE)
    found = Results(place)
    draw(found, place / "ablations.svg")
    print(tables(found), found.criteria(), sep="\n\n")
