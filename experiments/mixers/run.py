"""Every registered mixer under the same budget: quality, recall, rates and state bytes.

    python experiments/mixers/run.py                            # seventy minutes on one core
    python experiments/mixers/run.py --mixers gated_deltanet    # some of them; results.json then stays with the runs
    python experiments/mixers/run.py --quick                    # the machinery in a minute, two mixers; proves nothing

The mixers are those that the registry knows: a new one joins by itself.  Each has its learning rate tuned on the first seed.  Rates
are measured last, in turns.  A run that is interrupted goes on where it stopped.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.common import Rows, as_rows, at_most, command_line, conclude, keys, mean_recall, measured, part_of, remembered  # noqa: E402
from experiments.mixers.speed import measure  # noqa: E402

from limbeck.config.load import load_recipe  # noqa: E402
from limbeck.config.parts.mixers import MIXERS  # noqa: E402
from limbeck.config.recipe import Recipe  # noqa: E402
from limbeck.data.dataset import TokenRows  # noqa: E402
from limbeck.engine.metrics import loss_trace  # noqa: E402
from limbeck.models.loading import load_model, resolve_source  # noqa: E402
from limbeck.stages.run import open_stage, run_recipe  # noqa: E402

LABELS = {**{name: f"{{kind: {name}}}" for name in MIXERS}, "gated_deltanet: native": "{kind: gated_deltanet, preset: native}"}
"""Name -> the mixer as a recipe has it."""
REFERENCE = "gated_deltanet"
"""Rates are given as ratios to this one's."""
ARMS = {"linear": "all-linear", "kept": "25% kept"}
FACTORS = (1.0, 3.0)
"""Of the recipe's mixer learning rates, in align and in distillation alike; the rest stays as it is."""
LR_ALIGN, LR_DISTIL = 2.5e-3, 1.5e-3
CONTEXTS = (1024, 4096, 16384, 65536)
WORST = {
    "loss, end over start": "training loss of the last tenth of the steps over the first tenth's",
    "kl over copied": "held-out KL over that of the copied start",
}
"""What is to be below 1 for each mixer, arm and seed."""
QUICK = ["align.data.source.0.limit=100", "align.loop.tokens=4k", *(f"{arm}.loop.tokens=4k" for arm in ARMS)] + [
    f"evaluate_{arm}.{word}" for arm in ARMS for word in ("rows=4", "recall.rows=1", "recall.distances=[16, 64]")
]


def prefix(label: str, factor: float, seed: int) -> str:
    """Beginning of the stage names of one mixer, learning rate and seed."""
    return f"{label.replace(': ', '-')}-x{factor:g}-s{seed}-"


def part(label: str, factor: float, seed: int, arms: list[str], more: list[str]) -> Recipe:
    """The recipe of one mixer, learning rate and seed, down to some arms and their evaluations, under names of its own."""
    names = ["align", *arms, *(f"evaluate_{arm}" for arm in arms)]
    words = [f"align.student.surgery.0.mixer={LABELS[label]}", f"align.optim.groups.0.lr={LR_ALIGN * factor:g}"]
    words += [f"{arm}.optim.groups.0.lr={LR_DISTIL * factor:g}" for arm in arms] + [f"{name}.seed={seed}" for name in names]
    own = prefix(label, factor, seed)
    return part_of(load_recipe(HERE / "recipe.yaml", [*words, *more]), {name: own + name for name in names})


def run_mixer(label: str, factors: tuple[float, ...], seeds: list[int], more: list[str], out: Path) -> tuple[float, Rows]:
    """Tune on the first seed's all-linear arm by held-out KL, then run both arms of every seed at the best factor."""
    tried, rows = {}, []
    for factor in factors:
        run_recipe(part(label, factor, seeds[0], ["linear"], more), recipe_dir=HERE, run_dir=out)
        own = prefix(label, factor, seeds[0])
        tried[factor] = measured(out, own + "evaluate_linear")[own + "linear"]["kl"]
        rows += as_rows(f"tune {label}, learning rates x {factor:g}", seeds[0], {"kl": tried[factor]})
    best = min(tried, key=tried.__getitem__)
    for seed in seeds:
        run_recipe(part(label, best, seed, list(ARMS), more), recipe_dir=HERE, run_dir=out)
        own = prefix(label, best, seed)
        for arm, name in ARMS.items():
            found = measured(out, own + f"evaluate_{arm}")
            start, end = found["copy_init"], found[own + arm]
            rows += as_rows("teacher", seed, found["teacher"]) if (label, arm) == (REFERENCE, "linear") else []
            rows += as_rows(f"{name}, copied: {label}", seed, start)
            rows += as_rows(f"{name}: {label}", seed, {**end, "recall": mean_recall(end), "kl over copied": end["kl"] / start["kl"]})
            rows += as_rows(f"{name}: {label}", seed, {"loss, end over start": fall(out / (own + arm))})
        rows += as_rows(f"align: {label}", seed, {"loss, end over start": fall(out / (own + "align"))})
    return best, rows


def fall(stage: Path) -> float:
    """Mean training loss of the last tenth of the steps over that of the first tenth."""
    losses = loss_trace(stage / "metrics.jsonl")
    tenth = max(1, len(losses) // 10)
    return statistics.mean(losses[-tenth:]) / statistics.mean(losses[:tenth])


def timings(best: dict[str, float], seed: int, quick: bool, out: Path) -> Rows:
    """Rates and bytes of the all-linear students of one seed, and their ratios to the reference's."""
    stages = {label: prefix(label, factor, seed) + "linear" for label, factor in best.items()}
    last = open_stage(out / next(reversed(stages.values())))
    data, _ = last.data(last.options.data)
    batch = TokenRows(data, "train").batch(range(2 if quick else 4))
    models = {label: load_model(str(out / stage / "model")) for label, stage in stages.items()}
    teacher = load_model(resolve_source("builtin:code-2m"))
    contexts = CONTEXTS[:2] if quick else CONTEXTS
    found = remembered(
        out / "timings.json", keys(out, stages.values()),
        lambda: measure(models, teacher, batch, contexts=contexts, rounds=1 if quick else 7, tokens=4 if quick else 32),
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for label, values in found.items():
        ratios = {f"{key}, over {REFERENCE}": value / found[REFERENCE][key] for key, value in values.items() if "tokens/s" in key}
        rows += [{"setting": f"speed: {label}", "metric": metric, "value": value} for metric, value in (values | ratios).items()]
    return rows


def grows(rows: Rows, label: str) -> bool:
    """Whether a mixer's state is larger at long contexts."""
    sizes = {row["value"] for row in rows if row["setting"] == f"speed: {label}" and row["metric"].startswith("state bytes")}
    return len(sizes) > 1


def main() -> None:
    """Run every mixer, measure rates, and write results.json."""
    options = command_line(str(__doc__), "mixers", [1, 2], extra=["mixers"])
    labels = options.mixers or (["gated_deltanet", "path"] if options.quick else list(LABELS))
    labels = list(dict.fromkeys([*labels, REFERENCE]))
    more, factors = (QUICK, (1.0,)) if options.quick else ([], FACTORS)
    rows: Rows = []
    best: dict[str, float] = {}
    for label in labels:
        best[label], found = run_mixer(label, factors, options.seeds, more, options.out)
        rows += found
        print(f"{label}: learning rates x {best[label]:g}", flush=True)
    rows += [{"setting": f"align: {label}", "metric": "learning rates times", "value": factor} for label, factor in best.items()]
    rows += timings(best, options.seeds[-1], options.quick, options.out)
    growing = {label for label in labels if grows(rows, label)}
    criteria = []
    for kind, chosen in (("with a bounded state", set(labels) - growing), ("whose state grows", growing)):
        for metric, name in WORST.items():
            held = [row for row in rows if row["metric"] == metric and row["setting"].split(": ", 1)[1] in chosen]
            if held:
                worst = max(held, key=lambda row: row["value"])
                criteria.append(at_most(f"{name}, mixers {kind} (worst: {worst['setting']})", worst["value"], 1))
    conclude(
        options.out if options.quick or options.mixers else HERE,
        claim="every mixer learns from the same teacher under the same budget; what each buys and costs",
        command="python experiments/mixers/run.py" + (" --quick" if options.quick else ""),
        seeds=options.seeds,
        rows=rows,
        criteria=criteria,
    )


if __name__ == "__main__":
    main()
