"""Weights and deltas together: how much delta, on how many probes, read how.

    python experiments/ablations/run.py            # an hour and a half on one core (estimated)
    python experiments/ablations/run.py --quick    # the machinery in a minute; proves nothing

4 weights of the delta x 3 numbers of probes x 3 representations x 3 seeds, all on teachers of one start, so that the weights' mean squared
error has its best case.  Train stages with a grid; with weight zero neither probes nor representation change anything that trains, so
that there is one run a seed.  A run that is interrupted goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from experiments.adapters_lab import Lab  # noqa: E402
from experiments.common import Rows, as_rows, at_least, command_line, conclude, remembered  # noqa: E402

from limbeck.adapters.pool import read_pool  # noqa: E402
from limbeck.config.parts.stages import STAGES  # noqa: E402
from limbeck.data.conditions.store import ConditionSet  # noqa: E402
from limbeck.evaluation.adapters import BASE, TEACHER, Judged  # noqa: E402
from limbeck.evaluation.bootstrap import spearman  # noqa: E402
from limbeck.stages.adapting import entries_of, open_generator  # noqa: E402
from limbeck.stages.run import grid_cells, open_stage  # noqa: E402

WEIGHTS = {"zero": 0.0, "small": 1e-3, "medium": 3e-2, "large": 1.0}
PROBES = (5, 10, 20)
READINGS: dict[str, dict[str, Any]] = {
    "last token": {"tokens": "last", "per_probe": False},
    "mean-pool": {"tokens": "mean", "per_probe": False},
    "multi-layer": {"tokens": "last", "per_probe": False, "layers": [1, 2, 3]},
}
STEPS, ROWS, LENGTH = 80, 8, 32
SPLITS = ("seen", "held_out_slice")


def main() -> None:
    """The grid, then every cell's adapters on test text."""
    options = command_line(__doc__ or "", "adapters_lab", seeds=(1, 2, 3))
    lab = Lab(options.out, options.quick)
    probes, readings = (PROBES[:1], dict(list(READINGS.items())[:1])) if options.quick else (PROBES, READINGS)
    pool = lab.pool(1, "shared", splits=SPLITS)
    deltas: dict[str, tuple[int, str]] = {}
    for count in probes:
        for reading, represent in readings.items():
            layers = {"layers": [0, 1]} if options.quick and "layers" in represent else {}
            chosen = {"kind": "conditions", "conditions": {"from": "conditions"}, "count": count, "length": LENGTH, "seed": 2}
            stage = lab.deltas(pool, f"-ablate-{count}-{reading.replace(' ', '-')}", probes=chosen, represent={**represent, **layers})
            deltas[stage] = (count, reading)
    objectives = [{"kind": "weights", "loss": "mse"}, {"kind": "delta", "precision": "bfloat16", "weight": 1.0}]
    grids = {
        "ablate-zero": {"objectives.1.weight": [0.0], "teacher.deltas.from": [next(iter(deltas))]},
        "ablate": {"objectives.1.weight": [weight for weight in WEIGHTS.values() if weight], "teacher.deltas.from": list(deltas)},
    }
    cells: dict[str, list[Any]] = {}
    for label, grid in grids.items():
        name = lab.generator(label, objectives, seed=1, pool=pool, deltas=next(iter(deltas)), steps=STEPS, rows=ROWS)
        lab.stages[name]["grid"] = {**grid, "seed": list(options.seeds)}
        lab.stages[name]["loop"]["validate_every"] = 2 if options.quick else STEPS
        cells[name] = list(grid_cells(STAGES.options("train").model_validate(lab.stages[name])))
    lab.run()
    labels = [f"{stage}/{label}" for stage, found in cells.items() for label, _, _ in found]
    found = remembered(options.out / "ablations.json", labels, lambda: judge(lab, pool, cells))
    words = {weight: word for word, weight in WEIGHTS.items()}
    rows: Rows = []
    for stage, of_stage in cells.items():
        for label, settings, _ in of_stage:
            word, own = words[settings["objectives.1.weight"]], settings["teacher.deltas.from"]
            # The run of weight zero stands for all its cells.
            for count, reading in deltas.values() if word == "zero" else [deltas[own]]:
                rows += as_rows(f"{word} x {count} probes x {reading}", settings["seed"], found[f"{stage}/{label}"])
    rows += as_rows("base", 0, found[BASE]) + as_rows(TEACHER, 0, found[TEACHER])
    conclude(
        options.out if options.quick else HERE,
        "ablations: weights of the delta, numbers of probes and representations, beside the weights' mean squared error",
        "python experiments/ablations/run.py",
        options.seeds,
        rows,
        criteria(rows, found),
    )


def judge(lab: Lab, pool_stage: str, cells: dict[str, list[Any]]) -> dict[str, dict[str, float]]:
    """Cell -> loss on test text by split; the base's and the teachers' beside them."""
    out = lab.out
    conditions, pool = ConditionSet(out / "conditions" / "conditions"), read_pool(out / pool_stage / "adapters")
    entries, teachers = entries_of(pool, conditions), pool.adapters()
    found: dict[str, dict[str, float]] = {}
    for stage, label in [(stage, label) for stage, of_stage in cells.items() for label, _, _ in of_stage]:
        student = open_generator(open_stage(out / stage), out / stage / "grid" / label / "model", conditions, dtype=torch.float32)
        judged = Judged(student.model, student.injector, conditions, 2 if lab.quick else 8, 16)
        name = f"{stage}/{label}"
        columns: dict[str, Any] = {name: lambda ids, student=student: student.generate(torch.from_numpy(conditions.texts.of(np.array(ids)))).detach()}
        if not found:
            columns |= {BASE: lambda ids: None, TEACHER: lambda ids: teachers.pick([entries[i][0] for i in ids])}
        for split in SPLITS:
            for column, values in judged.nll(conditions.split(split), columns).items():
                found.setdefault(column, {})[f"nll, {split}"] = float(values.mean())
    return found


def criteria(rows: Rows, found: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """The best setting against weights alone, by the mean of the seeds."""
    metric = "nll, held_out_slice"
    means: dict[str, list[float]] = {}
    for row in rows:
        if row["metric"] == metric and " x " in row["setting"]:
            means.setdefault(row["setting"], []).append(row["value"])
    zero = float(np.mean([np.mean(v) for s, v in means.items() if s.startswith("zero")]))
    best = min((s for s in means if not s.startswith("zero")), key=lambda s: float(np.mean(means[s])))
    seen = [r["value"] for r in rows if r["metric"] == "nll, seen" and " x " in r["setting"]]
    held = [r["value"] for r in rows if r["metric"] == metric and " x " in r["setting"]]
    return [
        at_least(f"nats a token on held-out slices by which the best delta ({best}) is better than weights alone", zero - float(np.mean(means[best])), 0.0),
        at_least("Spearman correlation of seen and held-out losses over the cells (published whatever it is)", spearman(seen, held), -1.0),
    ]


if __name__ == "__main__":
    main()
