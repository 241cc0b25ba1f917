"""Draw `behaviour.svg` and print the README's tables from `results.json`.

python experiments/behaviour_beats_weights/plot.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.adapters_plots import folder, panels, rates, tables  # noqa: E402
from experiments.common import Results  # noqa: E402

if __name__ == "__main__":
    place = folder(HERE)
    found = Results(place)
    # The base recovers nothing and a teacher all of its own gain, by definition.
    known = ("base", "teacher")
    panels(found, ["share", "delta_cosine"], place / "behaviour.svg", {"share": known, "delta_cosine": known})
    print(tables(found), rates(found), found.criteria(), sep="\n\n")
