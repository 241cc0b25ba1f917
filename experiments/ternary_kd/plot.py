"""Draw `ternary_kd.svg` and print the README's tables from `results.json`.

python experiments/ternary_kd/plot.py [FOLDER]
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from experiments.common import Results, cell, markdown  # noqa: E402

MEASURES = {"ce": "held-out CE, nats", "kl": "KL from the teacher", "agreement": "agreement", "router/cv": "load's spread", "ternary/zeros": "codes that are 0"}


def draw(found: Results, arms: list[str], folder: Path) -> None:
    """Held-out cross-entropy of every arm; a dot a seed, a line for the mean; the teacher dashed."""
    figure, axis = plt.subplots(figsize=(7.5, 3.8))
    for place, arm in enumerate(reversed(arms)):
        values = found.values(arm, "ce")
        axis.plot(values, [place] * len(values), "o", color="C1" if "full" in arm else "C0")
        axis.plot([statistics.mean(values)] * 2, [place - 0.3, place + 0.3], color="black", linewidth=1)
    axis.axvline(statistics.mean(found.values("teacher", "ce")), color="grey", linestyle="--", label="teacher")
    axis.set(yticks=range(len(arms)), yticklabels=list(reversed(arms)), xlabel="held-out cross-entropy (nats/token)")
    axis.grid(alpha=0.3, axis="x")
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "ternary_kd.svg", metadata={"Date": None})


def main() -> None:
    """The picture and the tables: arms, the file, criteria."""
    folder = Path(sys.argv[1]) if sys.argv[1:] else HERE
    found = Results(folder)
    arms = [setting for setting in found.settings() if found.values(setting, "ce") and setting != "teacher"]
    draw(found, arms, folder)
    print(markdown(["arm", *MEASURES.values()], [[arm, *(cell(found.values(arm, m)) for m in MEASURES)] for arm in ["teacher", *arms]]))
    files = [(m, found.values("ternary by row, KD", f"export: {m}")) for m in ("positions", "median", "largest", "top1")]
    print("\n" + markdown(["file against torch", "mean (range)"], [[m, cell(values, ".3g")] for m, values in files if values]))
    print("\n" + found.criteria())


if __name__ == "__main__":
    main()
