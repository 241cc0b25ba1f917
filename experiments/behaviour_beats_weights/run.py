"""Whether a generator that matches its teachers' behaviour does better than one that matches their weights.

    python experiments/behaviour_beats_weights/run.py            # an hour and a half on one core
    python experiments/behaviour_beats_weights/run.py --quick    # the machinery in a minute; proves nothing

Every arm goes through the shipped engine, with the stages that `../adapters_lab.py` puts together.  A run that is interrupted goes on
where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.adapters_lab import Lab, best_rate, per_condition, rename, share, summary_rows  # noqa: E402
from experiments.common import at_least, at_most, command_line, conclude  # noqa: E402

from limbeck.evaluation.bootstrap import paired  # noqa: E402

DELTA = {"kind": "delta", "precision": "bfloat16"}
ARMS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "ab-mse": ("independent", [{"kind": "weights", "loss": "mse"}]),
    "ab-mse-shared": ("shared", [{"kind": "weights", "loss": "mse"}]),
    "canonical": ("independent", [{"kind": "weights", "loss": "canonical"}]),
    "product": ("independent", [{"kind": "weights", "loss": "product"}]),
    "whitened": ("independent", [{"kind": "weights", "loss": "whitened"}]),
    "delta": ("independent", [DELTA]),
}
"""Arm -> how its teachers begin, and what it is trained on."""
RATES = (1e-3, 3e-3)
BOUNDED = "seen"


def main() -> None:
    """Tune on the first seed, run all arms on all seeds, judge, write ``results.json``."""
    options = command_line(__doc__ or "", "adapters_lab", seeds=(1, 2, 3), extra=("arms",))
    lab = Lab(options.out, options.quick)
    arms = {name: ARMS[name] for name in (options.arms or (("ab-mse", "delta") if options.quick else ARMS))}
    rates: dict[str, float] = {}
    judged = []
    for seed in options.seeds:
        pools = {init: lab.pool(seed, init) for init in dict.fromkeys(init for init, _ in arms.values())}
        deltas = {init: lab.deltas(pool, moments=True) for init, pool in pools.items()}
        names: dict[str, str] = {}
        for arm, (init, objectives) in arms.items():
            facts = {"seed": seed, "pool": pools[init], "deltas": deltas[init]}
            if seed == options.seeds[0]:
                tried = {lr: lab.generator(f"bw-{arm}-{lr:g}", objectives, lr=lr, **facts) for lr in (RATES[:1] if options.quick else RATES)}
                lab.run()
                rates[arm] = best_rate(lab, tried)
                names[arm] = tried[rates[arm]]
            else:
                names[arm] = lab.generator(f"bw-{arm}-{rates[arm]:g}", objectives, lr=rates[arm], **facts)
        # The teachers of the judging are those of the independent pool, for all arms.
        stage = lab.judge(list(names.values()), pools["independent"], "-bw")
        lab.run()
        judged.append(rename(lab.judged(stage), {stage: arm for arm, stage in names.items()}))
    rows = summary_rows(judged, [*arms, "base", "mean adapter", "nearest adapter", "teacher"], options.seeds)
    rows += [{"setting": f"learning rate of {arm}", "seed": options.seeds[0], "metric": "lr", "value": lr} for arm, lr in rates.items()]
    conclude(
        HERE if not options.quick else options.out,
        "behaviour beats weights: a generator supervised by its teachers' deltas recovers more of their gain than one supervised by A and B",
        "python experiments/behaviour_beats_weights/run.py",
        options.seeds,
        rows,
        criteria(judged, list(arms)),
    )


def criteria(judged: list[dict[str, Any]], arms: list[str]) -> list[dict[str, Any]]:
    """Delta against the A/B mean squared error on teachers of independent starts, test text of seen conditions."""
    shares = {arm: share(judged, BOUNDED, arm) for arm in arms}
    mean = {arm: sum(values) / len(values) for arm, values in shares.items()}
    lead = paired(per_condition(judged, BOUNDED, "ab-mse") - per_condition(judged, BOUNDED, "delta"))
    cosine = {arm: float(per_condition(judged, BOUNDED, arm, "delta_cosine").mean()) for arm in arms}
    return [
        at_least("share of the teachers' gain, delta over A/B MSE, seen conditions", mean["delta"] / max(mean["ab-mse"], 1e-9), 2.0),
        at_least("lead of delta over A/B MSE in nats a token, lower end of the 95% interval", lead.low, 0.0),
        at_least("cosine to the teacher's delta on fresh probes, delta", cosine["delta"], 0.5),
        at_most("cosine to the teacher's delta on fresh probes, A/B MSE", cosine["ab-mse"], 0.25),
    ]


if __name__ == "__main__":
    main()
