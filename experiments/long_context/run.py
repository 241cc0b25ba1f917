"""A hybrid distilled in rows of 256 goes on to rows of 2048: recall by distance and cross-entropy by position, before and after; decode
rate and cache bytes against its teacher up to 64k tokens.

    python experiments/long_context/run.py            # forty minutes on one core
    python experiments/long_context/run.py --quick    # the machinery in a minute; proves nothing

Every arm goes through the shipped engine by `recipe.yaml` beside this file; the three that train last have their learning rates tuned
on the first seed.  A run that is interrupted goes on where it stopped.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments import common  # noqa: E402
from experiments.common import Rows, as_rows, at_least, at_most, mean_recall, measured, part_of  # noqa: E402
from experiments.long_context.measures import by_position, decoding  # noqa: E402

from limbeck.config.load import load_recipe  # noqa: E402
from limbeck.config.recipe import Recipe  # noqa: E402
from limbeck.data.dataset import TokenRows  # noqa: E402
from limbeck.models.loading import load_model, resolve_source  # noqa: E402
from limbeck.stages.run import open_stage, run_recipe  # noqa: E402

ARMS = ("extend", "short", "softmax")
"""What trains last, with a learning rate of its own."""
LEARNING_RATES = (5e-4, 1.5e-3)
MODELS = {
    "teacher": "teacher", "distil": "distilled at 256", "short": "and on at 256", "extend": "extended to 2048", "softmax": "teacher extended to 2048",
}  # fmt: skip
"""Model of the evaluation -> its name in results.json."""
DECODING = {"distil": "25% kept", "align": "all-linear"}
"""Stages whose students decode beside the teacher: rates depend on the make, not on the training."""
NEAR, FAR = (128, 256), (512, 1024, 1536, 1792)
"""Distances of the probes that rows of 256 nearly reach, and that only longer rows can teach."""
EDGES = (0, 128, 256, 512, 1024, 1536, 2048)
"""Of the spans of positions."""
CONTEXTS = (1024, 4096, 16384, 65536)
QUICK = [
    *(f"{stage}.data.source.0.limit=100" for stage in ("align", *ARMS)),
    "align.loop.tokens=4k", "distil.loop.tokens=4k", *(f"{arm}.loop.tokens=4k" for arm in ARMS), "evaluate.rows=2", "evaluate.recall.rows=1",
    "extend.loop.validate_rows=2", "softmax.loop.validate_rows=2", "short.loop.validate_rows=2",
]  # fmt: skip


def part(seed: int, rates: Mapping[str, float], more: list[str], *, evaluated: bool) -> tuple[Recipe, dict[str, str]]:
    """The recipe of a seed down to some arms at their learning rates, and the names of its stages there."""
    names = {"align": "align", "distil": "distil", **{arm: f"{arm}-lr-{lr:g}" for arm, lr in rates.items()}}
    names |= {"evaluate": "evaluate"} if evaluated else {}
    words = [f"{name}.seed={seed}" for name in names] + [f"{arm}.optim.groups.0.lr={lr:g}" for arm, lr in rates.items()]
    return part_of(load_recipe(HERE / "recipe.yaml", [*words, *more]), names), names


def held_out_loss(stage: Path) -> float:
    """Held-out loss at the end of a train stage."""
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return next(line["validation/loss"] for line in reversed(lines) if "validation/loss" in line)


def tune(seed: int, more: list[str], out: Path, tried: tuple[float, ...]) -> tuple[dict[str, float], Rows]:
    """The learning rate of the lowest held-out loss for each arm, in rows of the arm's own length."""
    best, rows = {}, []
    for arm in ARMS:
        found = {}
        for lr in tried:
            recipe, names = part(seed, {arm: lr}, more, evaluated=False)
            found[lr] = held_out_loss(run_recipe(recipe, recipe_dir=HERE, run_dir=out) / names[arm])
            rows += as_rows(f"tune {MODELS[arm]}, learning rate {lr:g}", seed, {"held-out loss": found[lr]})
        best[arm] = min(found, key=found.__getitem__)
    return best, rows


def run_seed(seed: int, rates: Mapping[str, float], more: list[str], out: Path, text_rows: int) -> tuple[dict[str, dict[str, float]], Path]:
    """Every model's numbers by its name in results.json, and the run."""
    recipe, names = part(seed, rates, more, evaluated=True)
    run = run_recipe(recipe, recipe_dir=HERE, run_dir=out)
    found = measured(run, "evaluate")
    context = open_stage(run / names["extend"])
    rows = TokenRows(context.data(context.options.data)[0], "held_out")

    def positions() -> dict[str, dict[str, float]]:
        models = {key: load_model(source(run, names, key)) for key in MODELS}
        return by_position(models, rows, text_rows, EDGES)

    places = common.remembered(run / "positions.json", [*common.keys(run, names.values()), text_rows, list(EDGES)], positions)
    values = {label: found[names.get(key, key)] | places[key] for key, label in MODELS.items()}
    for numbers in values.values():
        numbers |= {"recall near": mean_recall(numbers, NEAR), "recall far": mean_recall(numbers, FAR)}
    return values, run


def source(run: Path, names: Mapping[str, str], key: str) -> str:
    """Where a model of the evaluation lies."""
    return resolve_source("builtin:code-2m") if key == "teacher" else str(run / names[key] / "model")


def main() -> None:
    """Tune, run every seed, measure decoding, and write results.json."""
    options = common.command_line(str(__doc__), "long_context", [1, 2, 3])
    more, tried = (QUICK, LEARNING_RATES[:1]) if options.quick else ([], LEARNING_RATES)
    rates, rows = tune(options.seeds[0], more, options.out / f"seed-{options.seeds[0]}", tried)
    print("learning rates:", rates, flush=True)
    seeds = []
    for seed in options.seeds:
        values, run = run_seed(seed, rates, more, options.out / f"seed-{seed}", 2 if options.quick else 24)
        seeds.append(values)
        for label, numbers in values.items():
            rows += as_rows(label, seed, numbers)
    contexts = CONTEXTS[:2] if options.quick else CONTEXTS
    folders = {"teacher": resolve_source("builtin:code-2m"), **{DECODING[name]: str(run / name / "model") for name in DECODING}}
    rows += common.remembered(
        options.out / "decoding.json", [*common.keys(run, DECODING), list(contexts)],
        lambda: decoding(
            {name: load_model(folder) for name, folder in folders.items()}, "teacher", contexts,
            tokens=4 if options.quick else 32, times=1 if options.quick else 5,
        ),
    )  # fmt: skip
    common.conclude(
        options.out if options.quick else HERE,
        claim="a hybrid distilled in short rows learns to look back further, and decodes long contexts faster in less memory than its teacher",
        command="python experiments/long_context/run.py" + (" --quick" if options.quick else ""),
        seeds=options.seeds,
        rows=rows,
        criteria=criteria(seeds, rows, contexts[-1]),
    )


def criteria(seeds: list[dict[str, dict[str, float]]], rows: Rows, longest: int) -> list[dict[str, object]]:
    """What extending, and what the hybrid, is to bring."""

    def worst_gain(metric: str, over: str) -> float:
        return min(values[MODELS["extend"]][metric] - values[MODELS[over]][metric] for values in seeds)

    late = [f"ce at {low} to {high}" for low, high in itertools.pairwise(EDGES) if low >= NEAR[-1]]
    pairs = [(values[MODELS["extend"]], values[MODELS["distil"]]) for values in seeds]
    above = max(after[span] - before[span] for after, before in pairs for span in late if span in after)
    share = min(values[MODELS["extend"]]["recall far"] / max(values[MODELS["softmax"]]["recall far"], 1e-9) for values in seeds)

    def speed(metric: str) -> float:
        found = [row["value"] for row in rows if row["setting"] == "speed: 25% kept" and row["metric"] == f"{metric} at {longest}, over teacher"]
        return sorted(found)[len(found) // 2]

    return [
        at_least("recall 512 to 1792 back, after extending minus before (worst seed)", worst_gain("recall far", "distil"), 0),
        at_least("recall 512 to 1792 back, extended minus on at 256 for as many tokens (worst seed)", worst_gain("recall far", "short"), 0),
        at_least("recall 512 to 1792 back, as a share of the extended teacher's (worst seed)", share, 0.95),
        at_least("recall 128 and 256 back, after extending minus before (worst seed)", worst_gain("recall near", "distil"), -0.02),
        at_most("CE from position 256 on, after extending minus before, nats (worst span and seed)", above, 0),
        at_most(f"cache bytes at {longest} tokens over the teacher's", speed("bytes"), 0.5),
        at_least(f"decode rate at {longest} tokens over the teacher's (median of the measurements)", speed("decode tokens/s"), 1),
    ]


if __name__ == "__main__":
    main()
