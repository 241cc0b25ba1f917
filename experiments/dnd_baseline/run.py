"""The published baseline: hyper-convolutions that write Drag-and-Drop's tokens, trained on weights alone.

    python experiments/dnd_baseline/run.py            # half an hour on one core
    python experiments/dnd_baseline/run.py --quick    # the machinery in a minute; proves nothing

A run that is interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
from experiments.adapters_lab import Lab, rename, summary_rows  # noqa: E402
from experiments.common import as_rows, at_least, at_most, command_line, conclude  # noqa: E402
from peft import PeftModel  # noqa: E402

from limbeck.adapters.inject import Injector  # noqa: E402
from limbeck.adapters.peft_files import read_peft  # noqa: E402
from limbeck.models.loading import load_model  # noqa: E402
from limbeck.stages.run import open_stage  # noqa: E402

STEPS = 400
MSE = [{"kind": "weights", "loss": "mse"}]


def main() -> None:
    """The baseline and a query generator under the same loss, on teachers of one start; the baseline's adapters are exported and loaded."""
    options = command_line(__doc__ or "", "adapters_lab", seeds=(1, 2, 3))
    lab = Lab(options.out, options.quick)
    judged, rows = [], []
    differences, falls = [], []
    for seed in options.seeds:
        pool = lab.pool(seed, "shared")
        arms = {
            "hyperconv": lab.generator("dnd-hyperconv", MSE, seed=seed, pool=pool, steps=STEPS, surgery={"decoder": "hyperconv"}),
            "queries": lab.generator("dnd-queries", MSE, seed=seed, pool=pool, steps=STEPS),
        }
        stage = lab.judge(list(arms.values()), pool, "-dnd")
        export = f"export-dnd-s{seed}"
        lab.stages[export] = {"kind": "export", "from": arms["hyperconv"], "to": "peft", "conditions": ["stdlib/*/upper"]}
        lab.run()
        judged.append(rename(lab.judged(stage), {name: arm for arm, name in arms.items()}))
        for arm, name in arms.items():
            losses = [json.loads(line) for line in (options.out / name / "metrics.jsonl").read_text().splitlines()]
            course = [line["validation/weights/raw"] for line in losses if "validation/weights/raw" in line]
            rows += as_rows(f"training: {arm}", seed, {"A/B MSE, first validation": course[0], "A/B MSE, last": course[-1]})
            if arm == "hyperconv":
                first = next(line["losses"][0] for line in losses if "losses" in line)
                falls.append(course[-1] / first)
        differences.append(largest_difference(options.out, arms["hyperconv"], export))
    rows += summary_rows(judged, ["hyperconv", "queries", "base", "mean adapter", "nearest adapter", "teacher"], options.seeds)
    for seed, difference in zip(options.seeds, differences, strict=True):
        rows += as_rows("generated adapter in peft", seed, {"largest logit difference": difference})
    conclude(
        options.out if options.quick else HERE,
        "Drag-and-Drop's baseline runs end to end: a few hundred steps on weights alone, the loss falls, the adapter loads in peft",
        "python experiments/dnd_baseline/run.py",
        options.seeds,
        rows,
        [
            at_most("A/B MSE on held-out texts at the end over that of the first step, worst seed", max(falls), 0.9),
            at_most("logits of a generated adapter in peft against ours, worst seed", max(differences), 1e-5),
            at_least("seeds", float(len(options.seeds)), 1.0),
        ],
    )


def largest_difference(run: Path, generator: str, export: str) -> float:
    """Of the logits of an exported adapter, loaded by peft onto the base, from the injected one."""
    folder = next(path for path in sorted((run / export / "export" / "peft").iterdir()) if path.is_dir())
    context = open_stage(run / generator)
    source: Any = context.locate(context.options.student.base)
    ids = torch.arange(64).reshape(2, 32) * 7 % 500
    model = load_model(source)
    ours = read_peft(folder, model)
    injector = Injector(model, ours.spec)
    with torch.no_grad(), injector.active(ours):
        expected = model(input_ids=ids, use_cache=False).logits
    injector.remove()
    with torch.no_grad():
        found = PeftModel.from_pretrained(load_model(source), str(folder))(input_ids=ids, use_cache=False).logits
    return float((found - expected).abs().max())


if __name__ == "__main__":
    main()
