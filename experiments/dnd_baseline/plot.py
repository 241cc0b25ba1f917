"""Draw `baseline.svg` and print the README's tables from `results.json`.

python experiments/dnd_baseline/plot.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.adapters_plots import folder, panels, tables  # noqa: E402
from experiments.common import Results, cell, markdown  # noqa: E402

MARK = "training: "
METRICS = ("A/B MSE, first validation", "A/B MSE, last")
DIFFERENCE = ("generated adapter in peft", "largest logit difference")


def training(results: Results) -> str:
    """The loss that both decoders train on, for test text of seen conditions."""
    arms = [setting.removeprefix(MARK) for setting in results.settings() if setting.startswith(MARK)]
    lines = [[arm, *(cell(results.values(MARK + arm, metric), ".3e") for metric in METRICS)] for arm in arms]
    return markdown(["decoder", *METRICS], lines)


def loaded(results: Results) -> str:
    """What peft makes of an exported adapter."""
    return markdown([DIFFERENCE[0], DIFFERENCE[1]], [["hyperconv", cell(results.values(*DIFFERENCE), ".1e")]])


if __name__ == "__main__":
    place = folder(HERE)
    found = Results(place)
    known = ("base", "teacher")
    panels(found, ["share", "delta_cosine"], place / "baseline.svg", {"share": known, "delta_cosine": known})
    print(training(found), tables(found), loaded(found), found.criteria(), sep="\n\n")
