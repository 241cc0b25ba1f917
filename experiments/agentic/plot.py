"""Draw `agentic.svg` and print the README's tables from `results.json`.

python experiments/agentic/plot.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import matplotlib.pyplot as plt  # noqa: E402
from experiments.adapters_plots import folder  # noqa: E402
from experiments.common import Results, cell, markdown  # noqa: E402

SPLITS = ("held-out repositories", "repositories trained on")
ARMS = ("base", "static", "shuffled", "generated")
PARTS = ("name", "keys", "values")


def losses(results: Results, split: str) -> str:
    """Loss, KL and agreement by arm."""
    lines = [[arm, *(cell(results.values(f"{split}: {arm}", metric)) for metric in ("nll", "kl", "agreement"))] for arm in ARMS]
    return markdown([split, "loss", "KL to the teacher", "agreement"], lines)


def calls(results: Results, split: str) -> str:
    """Tool calls by arm: after the true words, and written by the model itself."""
    kinds = [f"{kind} {part}" for kind in ("forced", "written") for part in PARTS]
    lines = [[arm, *(cell(results.values(f"{split}: {arm}", kind), ".2f") for kind in kinds)] for arm in ARMS]
    return markdown([split, *kinds], lines)


def draw(results: Results, path: Path) -> None:
    """KL to the teacher by arm, a dot a seed."""
    figure, axes = plt.subplots(1, len(SPLITS), figsize=(8, 2.6), sharex=True, layout="constrained")
    for axis, split in zip(axes, SPLITS, strict=True):
        for place, arm in enumerate(reversed(ARMS)):
            values = results.values(f"{split}: {arm}", "kl")
            axis.barh(place, sum(values) / len(values), color="#8fb3c9" if arm == "generated" else "#c9c9c9")
            axis.plot(values, [place] * len(values), "k.", markersize=4)
        axis.set_yticks(range(len(ARMS)), list(reversed(ARMS)))
        axis.set_title(split, fontsize=9)
        axis.set_xlabel("KL to the teacher, nats a token")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    place = folder(HERE)
    found = Results(place)
    draw(found, place / "agentic.svg")
    print(*(table(found, split) for split in SPLITS for table in (losses, calls)), found.criteria(), sep="\n\n")
