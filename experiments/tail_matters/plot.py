"""Draw `kl.svg` and print the README's table from `results.json`; for the far student the table alone.

python experiments/tail_matters/plot.py [far]
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent.joinpath(*sys.argv[1:])
NAMES = {"tail": "tail bucket", "zero": "zero", "renorm_both": "both renormalised"}


def values(setting: str, metric: str) -> list[float]:
    """One number a seed."""
    rows = json.loads((HERE / "results.json").read_text())["rows"]
    return [row["value"] for row in rows if row["setting"] == setting and row["metric"] == metric]


def draw() -> None:
    """Held-out KL against k, a panel a temperature, a line a tail; bars span the seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True)
    for axis, temperature in zip(axes, (1, 2), strict=True):
        for tail, name in NAMES.items():
            kept = (8, 32, 128)
            found = [values(f"k={k}, {tail}, T={temperature}", "kl") for k in kept]
            means = [statistics.mean(v) for v in found]
            spread = [[m - min(v) for m, v in zip(means, found, strict=True)], [max(v) - m for m, v in zip(means, found, strict=True)]]
            axis.errorbar(kept, means, yerr=spread, marker="o", capsize=3, label=name)
        axis.axhline(statistics.mean(values(f"dense, T={temperature}", "kl")), color="grey", linestyle="--", label="dense")
        axis.set(xscale="log", yscale="log", xlabel="ids kept", title=f"T = {temperature}", xticks=kept, xticklabels=kept)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("held-out KL to the teacher (nats/token)")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(HERE / "kl.svg", metadata={"Date": None})


def table() -> str:
    """Mean and range over the seeds, as Markdown."""
    rows = json.loads((HERE / "results.json").read_text())["rows"]
    lines = ["| arm | held-out KL to the teacher | held-out CE | agreement |", "|---|---|---|---|"]
    settings = sorted(
        dict.fromkeys(row["setting"] for row in rows),
        key=lambda s: (not s.startswith("ce"), s[-3:], not s.startswith("dense"), int(re.sub(r"\D", "", s.split(",")[0]) or 0)),
    )
    for setting in settings:
        cells = []
        for metric in ("kl", "ce", "agreement"):
            found = values(setting, metric)
            cells.append(f"{statistics.mean(found):.4f} ({min(found):.4f}–{max(found):.4f})" if found else "")
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if not sys.argv[1:]:
        draw()
    print(table())
