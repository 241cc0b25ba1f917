"""Draw `mixers.svg` and the README's tables from `results.json`.

python experiments/mixers/plot.py
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.common import Results, cell, markdown  # noqa: E402
from experiments.mixers.run import ARMS, REFERENCE  # noqa: E402

PANELS = (
    ("held-out KL, nats/token", "kl"),
    ("recall, mean of the probes", "recall"),
)
RATES = ("training tokens/s", "decode tokens/s at 1024")


def labels(results: Results) -> list[str]:
    """Mixers by the all-linear arm's KL, the best first."""
    mark = f"{ARMS['linear']}: "
    found = [setting.removeprefix(mark) for setting in results.settings() if setting.startswith(mark)]
    return sorted(found, key=lambda label: statistics.mean(results.values(mark + label, "kl")))


def draw(results: Results) -> None:
    """A line a mixer; quality and recall of both arms with the range over seeds, and rates over the reference's."""
    order = labels(results)[::-1]
    figure, axes = plt.subplots(1, 3, figsize=(10, 1.2 + 0.3 * len(order)), sharey=True)
    places = list(range(len(order)))
    for axis, (title, metric) in zip(axes[:2], PANELS, strict=True):
        for shift, (marker, arm) in zip((0.12, -0.12), zip("os", ARMS.values(), strict=True), strict=True):
            found = [results.values(f"{arm}: {label}", metric) for label in order]
            means = [statistics.mean(values) for values in found]
            spread = [[m - min(v) for m, v in zip(means, found, strict=True)], [max(v) - m for m, v in zip(means, found, strict=True)]]
            axis.errorbar(means, [place + shift for place in places], xerr=spread, fmt=marker, capsize=2, label=arm)
        axis.set(xlabel=title)
    axes[0].set_xscale("log")
    for shift, marker, rate in zip((0.12, -0.12), "D^", RATES, strict=True):
        found = [results.values(f"speed: {label}", f"{rate}, over {REFERENCE}") for label in order]
        axes[2].plot([v[0] for v in found], [place + shift for place in places], marker, label=rate.replace("tokens/s ", ""))
    axes[2].axvline(1, color="grey", linewidth=0.8)
    axes[2].set(xlabel=f"rate over {REFERENCE}'s", xlim=(0, None))
    axes[0].set_yticks(places, order)
    axes[0].set_ylim(-0.5, len(order) - 0.5)
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
    for axis in axes[::2]:
        axis.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.tight_layout()
    figure.savefig(HERE / "mixers.svg", metadata={"Date": None})


def quality(results: Results) -> str:
    """Both arms and the copied starts of each mixer."""
    head = ["mixer", "lr x"]
    for arm in ARMS.values():
        head += [f"{arm}: KL copied", "KL", "CE", "agreement", "recall", "repeat, 64 back"]
    lines = []
    for label in labels(results):
        line = [label, cell(results.values(f"align: {label}", "learning rates times"), "g")]
        for arm in ARMS.values():
            line.append(cell(results.values(f"{arm}, copied: {label}", "kl")))
            line += [cell(results.values(f"{arm}: {label}", metric)) for metric in ("kl", "ce", "agreement", "recall", "recall/repeat/64")]
        lines.append(line)
    return markdown(head, lines)


def costs(results: Results) -> str:
    """Rates over the reference's and bytes."""
    settings = [f"speed: {label}" for label in [*labels(results), "teacher"]]
    metrics: dict[str, Any] = {}
    for setting in settings:
        metrics |= {row["metric"]: None for row in results.tree["rows"] if row["setting"] == setting}
    ratios = [m for m in metrics if m.endswith(f"over {REFERENCE}")]
    sizes = [m for m in metrics if m.startswith("state bytes")]
    head = ["mixer", "training tokens/s", *(m.replace(f", over {REFERENCE}", "").replace("tokens/s", "rate") for m in ratios), *sizes]
    lines = []
    for setting in settings:
        line = [setting.removeprefix("speed: "), cell(results.values(setting, "training tokens/s"), ".0f")]
        line += [cell(results.values(setting, metric), ".2f") for metric in ratios]
        lines.append(line + [cell(results.values(setting, metric), ",.0f") for metric in sizes])
    return markdown(head, lines)


if __name__ == "__main__":
    found = Results(HERE)
    draw(found)
    print(quality(found), costs(found), found.criteria(), sep="\n\n")
