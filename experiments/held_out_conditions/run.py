"""Whether a generator writes useful adapters for conditions that it has never met.

    python experiments/held_out_conditions/run.py            # an hour on one core
    python experiments/held_out_conditions/run.py --quick    # the machinery in a minute; proves nothing

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
from experiments.common import at_least, command_line, conclude  # noqa: E402

from limbeck.evaluation.bootstrap import paired  # noqa: E402

RATES = {"generated": (1e-3, 2e-3), "static": (3e-3, 1e-2)}
STEPS = 1000
SFT = [{"kind": "ce"}]
SPLIT = "held_out_slice"


def main() -> None:
    """Tune both arms on the first seed, run all seeds, judge, write ``results.json``."""
    options = command_line(__doc__ or "", "adapters_lab", seeds=(1, 2, 3))
    lab = Lab(options.out, options.quick)
    chosen: dict[str, float] = {}
    judged = []
    for seed in options.seeds:
        pool = lab.pool(seed)
        stages: dict[str, str] = {}
        for arm, surgery in (("generated", None), ("static", {"condition": "none"})):
            rates = RATES[arm] if arm not in chosen else (chosen[arm],)
            tried = {lr: lab.generator(f"ho-{arm}-{lr:g}", SFT, seed=seed, lr=lr, steps=STEPS, surgery=surgery) for lr in rates}
            lab.run()
            chosen[arm] = best_rate(lab, tried)
            stages[arm] = tried[chosen[arm]]
        stage = lab.judge(list(stages.values()), pool, "-ho", draws=3)
        lab.run()
        names = {stages["generated"]: "generated", stages["static"]: "static", f"{stages['generated']}, shuffled": "shuffled"}
        judged.append(rename(lab.judged(stage), names))
    columns = ("base", "mean adapter", "nearest adapter", "shuffled", "static", "generated", "teacher")
    rows = summary_rows(judged, columns, options.seeds)
    rows += [{"setting": f"learning rate of {arm}", "seed": options.seeds[0], "metric": "lr", "value": lr} for arm, lr in chosen.items()]
    conclude(
        HERE if not options.quick else options.out,
        "held out: an adapter generated from the texts of a condition that was never met in training beats the base and every control",
        "python experiments/held_out_conditions/run.py",
        options.seeds,
        rows,
        criteria(judged),
    )


def criteria(judged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """On held-out slices of seen sources."""
    generated, base, teacher = (per_condition(judged, SPLIT, name) for name in ("generated", "base", "teacher"))
    found = [
        at_least("held-out slices (and seeds) on which the generated adapter beats the base", float((generated < base).mean()), 0.75),
        at_least("mean over slices of the share of the slice's own teacher's gain", float(((base - generated) / (base - teacher)).mean()), 0.25),
    ]
    for control in ("shuffled", "static", "nearest adapter", "mean adapter"):
        lead = paired(per_condition(judged, SPLIT, control) - generated)
        found.append(at_least(f"lead over '{control}' in nats a token, lower end of the 95% interval", lead.low, 0.0))
    sources = share(judged, "held_out_source", "generated") if "held_out_source" in judged[0]["splits"] else []
    if sources:
        found.append(at_least("published whatever it is: share of the teachers' gain on held-out sources", sum(sources) / len(sources), 0.0))
    return found


if __name__ == "__main__":
    main()
