"""Draw `held_out.svg` and print the README's tables from `results.json`.

python experiments/held_out_conditions/plot.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.adapters_plots import GAIN, folder, panels, rates, tables  # noqa: E402
from experiments.common import Results  # noqa: E402

if __name__ == "__main__":
    place = folder(HERE)
    found = Results(place)
    # The base gains nothing, and a teacher's share of its own gain is 1.
    panels(found, [GAIN, "share"], place / "held_out.svg", {GAIN: ("base",), "share": ("base", "teacher")})
    print(tables(found), rates(found), found.criteria(), sep="\n\n")
