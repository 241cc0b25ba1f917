"""Draw `delta_only.svg` and print the README's tables from `results.json`.

python experiments/delta_only/plot.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.adapters_plots import GAIN, folder, panels, tables  # noqa: E402
from experiments.common import Results, cell, markdown  # noqa: E402

MARK = "training: "


def training(results: Results) -> str:
    """Each arm at its last validation: text beside the probes that it was trained on."""
    arms = [setting.removeprefix(MARK) for setting in results.settings() if setting.startswith(MARK)]
    metrics = ("held-out ce", "cosine on its own probes")
    lines = [[arm, *(cell(results.values(MARK + arm, metric)) for metric in metrics)] for arm in arms]
    return markdown(["at the end of training", "cross-entropy on test text, seen conditions", metrics[1]], lines)


if __name__ == "__main__":
    place = folder(HERE)
    found = Results(place)
    # The base has no delta, and a teacher's has cosine 1 to itself.
    known = {GAIN: ("base",), "delta_cosine": ("base", "teacher")}
    # A broken model loses far more than any adapter gains.
    panels(found, [GAIN, "delta_cosine"], place / "delta_only.svg", known, wide={GAIN: 0.1})
    print(training(found), tables(found), found.criteria(), sep="\n\n")
