"""Supervision by deltas alone: the published representation, which breaks the model, and what rescues it.

    python experiments/delta_only/run.py            # two hours on one core (estimated)
    python experiments/delta_only/run.py --quick    # the machinery in a minute; proves nothing

Every arm goes through the shipped engine, with the stages that `../adapters_lab.py` puts together.  A run that is interrupted goes on
where it stopped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np  # noqa: E402
from experiments.adapters_lab import Lab, per_condition, rename, summary_rows  # noqa: E402
from experiments.common import as_rows, at_least, command_line, conclude  # noqa: E402

from limbeck.evaluation.bootstrap import spearman  # noqa: E402

DELTA = {"kind": "delta", "precision": "bfloat16"}
GUARDS = [{"kind": "tether", "weight": 0.1, "precision": "bfloat16"}, {"kind": "norm_penalty", "weight": 0.01}]
ARMS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "paper": ("-paper", [DELTA]),
    "paper, guarded": ("-paper", [DELTA, *GUARDS]),
    "diverse": ("", [DELTA]),
    "diverse, guarded": ("", [DELTA, *GUARDS]),
}
"""Arm -> whose deltas, and the objectives."""
SPLITS = ("seen", "held_out_slice")


def main() -> None:
    """All arms on all seeds, a predictor for retrieval beside them, judged together."""
    options = command_line(__doc__ or "", "adapters_lab", seeds=(1, 2, 3))
    lab = Lab(options.out, options.quick)
    judged, rows = [], []
    for seed in options.seeds:
        pool = lab.pool(seed, splits=SPLITS)
        deltas = {"-paper": lab.deltas(pool, "-paper", paper=True), "": lab.deltas(pool, moments=True)}
        names = {
            arm: lab.generator(f"do-{arm.replace(', ', '-')}", objectives, seed=seed, pool=pool, deltas=deltas[which])
            for arm, (which, objectives) in ARMS.items()
        }
        means = lab.deltas(pool, "-mean", represent={"tokens": "mean"})
        predictor = lab.generator("do-predictor", [{"kind": "delta"}], seed=seed, pool=pool, deltas=means)
        lab.stages[predictor]["student"]["surgery"] = [{"kind": "delta_predictor", "width": 128}]
        lab.stages[predictor]["objectives"] = [{"kind": "delta"}]
        stage = lab.judge(list(names.values()), pool, "-do", predictors=[predictor], deltas={"from": means}, splits=list(SPLITS))
        lab.run()
        merges = {f"{predictor}: {what}": f"retrieved: {what}" for what in ("nearest", "mean of 3", "TIES of 3")}
        judged.append(rename(lab.judged(stage), {name: arm for arm, name in names.items()} | merges))
        for arm, name in names.items():
            lines = [json.loads(line) for line in (options.out / name / "metrics.jsonl").read_text().splitlines()]
            course = [(line["validation/ce"], line["validation/delta_cosine"]) for line in lines if "validation/ce" in line]
            rows += as_rows(f"training: {arm}", seed, {"held-out ce": course[-1][0], "cosine on its own probes": course[-1][1]})
    columns = [*ARMS, "retrieved: nearest", "retrieved: mean of 3", "retrieved: TIES of 3", "base", "mean adapter", "nearest adapter", "teacher"]
    rows += summary_rows(judged, columns, options.seeds)
    conclude(
        options.out if options.quick else HERE,
        "delta only: matching deltas alone makes useful adapters if the probes are diverse and every token counts; the published form does not",
        "python experiments/delta_only/run.py",
        options.seeds,
        rows,
        criteria(judged),
    )


def criteria(judged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """On test text of seen conditions."""
    nll = {arm: per_condition(judged, "seen", arm) for arm in (*ARMS, "base", "teacher", "retrieved: mean of 3")}
    sources = np.array([c["source"] for c in judged[0]["conditions"] if c["split"] == "seen"])
    gains = {arm: [float((nll["base"] - values)[sources == source].mean()) for source in sorted(set(sources))] for arm, values in nll.items()}
    cosine = per_condition(judged, "seen", "diverse, guarded", "delta_cosine")
    return [
        at_least("paper deltas alone degenerate: nats a token by which they are worse than diverse ones", float((nll["paper"] - nll["diverse"]).mean()), 0.1),
        at_least("sources on which diverse and guarded deltas beat the base", float(np.mean([g > 0 for g in gains["diverse, guarded"]])), 1.0),
        at_least("sources on which diverse deltas alone beat the base (one is asked)", float(sum(g > 0 for g in gains["diverse"])), 1.0),
        at_least("fresh-probe cosine of diverse and guarded deltas", float(cosine.mean()), 0.5),
        at_least(
            "Spearman correlation of fresh-probe cosine and gain over conditions (published whatever it is)",
            spearman(list(cosine.mean(1)), list((nll["base"] - nll["diverse, guarded"]).mean(1))),
            -1.0,
        ),
    ]


if __name__ == "__main__":
    main()
