"""A trained softmax model becomes a hybrid that keeps its quality: three seeds, with controls at equal total tokens.

    python experiments/hybrid_recovers/run.py            # about an hour on one core
    python experiments/hybrid_recovers/run.py --quick    # the machinery in a minute; proves nothing

Every arm goes through the shipped engine by `recipe.yaml` beside this file.  A run that is interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from benchmarks.evidence import write_results  # noqa: E402
from experiments.common import at_least, at_most, measured, residuals  # noqa: E402

from limbeck.config.load import load_recipe  # noqa: E402
from limbeck.config.recipe import Recipe  # noqa: E402
from limbeck.data.tokenizer import ordinary_ids  # noqa: E402
from limbeck.evaluation.retrieval import retrieval_layers  # noqa: E402
from limbeck.models.loading import load_model, load_tokenizer, resolve_source  # noqa: E402
from limbeck.stages.run import run_recipe  # noqa: E402

LEARNING_RATES = (1e-3, 3e-3, 8e-3)
"""Of the mixers; the rest trains at a fifth of it.  Tuned on the first seed, once for the aligned arms and once for the control."""
QUICK = [
    "align.data.source.0.limit=100", "text_linear.data.source.limit=100", "text_kept.data.source.limit=100",
    *(f"{stage}.loop.validate_rows=2" for stage in ("align", "linear", "kept", "no_align", "align_rows", "rows")),
    "align.loop.tokens=8k", "linear.loop.tokens=8k", "kept.loop.tokens=8k", "no_align.loop.tokens=16k", "align_rows.loop.tokens=8k",
    "rows.loop.tokens=8k", "text_linear.rows=4", "text_kept.rows=4",
    "evaluate_linear.rows=4", "evaluate_kept.rows=4", "evaluate_linear.recall.rows=2", "evaluate_kept.recall.rows=2",
]  # fmt: skip


def seeded(seed: int, *more: str) -> Recipe:
    """The recipe with one seed in every stage."""
    stages = load_recipe(HERE / "recipe.yaml").stages
    return load_recipe(HERE / "recipe.yaml", [*(f"{name}.seed={seed}" for name in stages), *more])


def rates(lr: float) -> list[dict[str, Any]]:
    """Optimiser groups at a mixer learning rate."""
    return [{"role": "mixers", "lr": lr}, {"role": "rest", "lr": lr / 5}]


def tune_no_align(seed: int, more: list[str], out: Path, tried: tuple[float, ...]) -> tuple[float, list[dict[str, Any]]]:
    """The control's best mixer learning rate by held-out cross-entropy, on one seed."""
    tree = seeded(seed, *more).model_dump(mode="json", by_alias=True)
    found = {}
    for lr in tried:
        stage = {**tree["stages"]["no_align"], "data": tree["stages"]["align"]["data"]}
        stage["optim"] = {**stage["optim"], "groups": rates(lr)}
        evaluate = {**tree["stages"]["evaluate_kept"], "from": "no_align", "against": ["teacher"], "recall": None}
        recipe = Recipe.model_validate({"name": "tune", "stages": {"no_align": stage, "evaluate": evaluate}})
        run = run_recipe(recipe, recipe_dir=HERE, run_dir=out / f"no_align-lr-{lr:g}")
        found[lr] = measured(run, "evaluate")["no_align"]["ce"]
    return best(found, "no_align", seed)


def tune_aligned(seed: int, more: list[str], out: Path, tried: tuple[float, ...]) -> tuple[float, list[dict[str, Any]]]:
    """The same for the aligned all-linear arm."""
    tree = seeded(seed, *more).model_dump(mode="json", by_alias=True)["stages"]
    stages = {"align": tree["align"]}
    for lr in tried:
        name = f"linear-lr-{lr:g}"
        stages[name] = {**tree["linear"], "optim": {**tree["linear"]["optim"], "groups": rates(lr)}}
        stages[f"evaluate-{name}"] = {**tree["evaluate_kept"], "from": name, "against": ["teacher"], "recall": None}
    run = run_recipe(Recipe.model_validate({"name": "tune", "stages": stages}), recipe_dir=HERE, run_dir=out / "linear-lr")
    names = {lr: f"linear-lr-{lr:g}" for lr in tried}
    return best({lr: measured(run, f"evaluate-{name}")[name]["ce"] for lr, name in names.items()}, "linear", seed)


def best(found: dict[float, float], setting: str, seed: int) -> tuple[float, list[dict[str, Any]]]:
    """The learning rate of the lowest cross-entropy, and a row for each."""
    rows = [{"setting": setting, "seed": seed, "lr_mixers": lr, "metric": "ce", "value": value} for lr, value in found.items()]
    return min(found, key=found.__getitem__), rows


def retrieving_layers(source: str) -> list[int]:
    """Layers of the teacher that look back, also those that do so only when others are silent."""
    folder = resolve_source(source)
    return retrieval_layers(load_model(folder), ordinary_ids(load_tokenizer(folder))[:512], distance=128)


def longer(seed: int, more: list[str], out: Path, factor: int) -> list[dict[str, Any]]:
    """Whether what is missing all-linear is missing for want of tokens: align and distil of one seed with ``factor`` times as many."""
    tree = seeded(seed, *more).model_dump(mode="json", by_alias=True)["stages"]
    stages = {name: tree[name] for name in ("align", "linear", "evaluate_linear", "text_linear")}
    for name in ("align", "linear"):
        stages[name]["loop"]["tokens"] *= factor
    for name in ("evaluate_linear", "text_linear"):
        stages[name]["against"] = ["teacher"]
    run = run_recipe(Recipe.model_validate({"name": "longer", "stages": stages}), recipe_dir=HERE, run_dir=out / f"longer-{factor}x")
    rows = [
        {"setting": f"all-linear, {factor}x tokens, {text}: {name}", "seed": seed, "metric": metric, "value": value}
        for stage, text in (("evaluate_linear", "text and recall"), ("text_linear", "text"))
        for name, values in measured(run, stage).items()
        for metric, value in values.items()
    ]
    found = residuals(run, "align").items()
    return rows + [
        {"setting": f"align, {factor}x tokens", "seed": seed, "metric": f"residual/{layer}", "value": value} for layer, value in found
    ]


def main() -> None:
    """Run every arm of every seed and write results.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the machinery in a minute; one seed, few tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/hybrid_recovers"), help="where the runs go")
    options = parser.parse_args()
    seeds = options.seeds[:1] if options.quick else options.seeds
    more = QUICK if options.quick else []
    out = options.out / "quick" if options.quick else options.out

    tried = LEARNING_RATES[:1] if options.quick else LEARNING_RATES
    control_lr, rows = tune_no_align(seeds[0], more, out, tried)
    aligned_lr, tuned = tune_aligned(seeds[0], more, out, tried)
    rows += tuned
    for arm, lr in (("no_align", control_lr), ("linear", aligned_lr), ("kept", aligned_lr), ("rows", aligned_lr)):
        more = [*more, f"{arm}.optim.groups.0.lr={lr}", f"{arm}.optim.groups.1.lr={lr / 5}"]
    recovered: dict[str, list[float]] = {"linear": [], "kept": [], "no_align": [], "rows": []}
    gaps: dict[str, list[float]] = {name: [] for name in recovered}
    text_gaps: dict[str, list[float]] = {"linear": [], "kept": []}
    retrieving = retrieving_layers("builtin:code-2m")
    worst_residual = []
    for seed in seeds:
        run = run_recipe(seeded(seed, *more), recipe_dir=HERE, run_dir=out / f"seed-{seed}")
        linear, kept = measured(run, "evaluate_linear"), measured(run, "evaluate_kept")
        for name in recovered:
            found = kept if name == "kept" else linear
            teacher, start = found["teacher"]["ce"], found["copy_init"]["ce"]
            recovered[name].append((start - found[name]["ce"]) / (start - teacher))
            gaps[name].append(found[name]["ce"] - teacher)
        texts = {name: measured(run, f"text_{name}") for name in text_gaps}
        for name, found in texts.items():
            text_gaps[name].append(found[name]["ce"] - found["teacher"]["ce"])
        named = {"all-linear": linear, "25% kept": kept, "text, all-linear": texts["linear"], "text, 25% kept": texts["kept"]}
        for label, found in named.items():
            for name, values in found.items():
                rows += [{"setting": f"{label}: {name}", "seed": seed, "metric": m, "value": v} for m, v in values.items()]
        for layer, value in residuals(run, "align").items():
            rows.append({"setting": "align", "seed": seed, "metric": f"residual/{layer}", "value": value})
        worst_residual.append(max(value for layer, value in residuals(run, "align").items() if int(layer) not in retrieving))
    rows += longer(seeds[0], more, out, 1 if options.quick else 5)
    mean = {name: statistics.mean(values) for name, values in recovered.items()}
    gap = {name: statistics.mean(values) for name, values in gaps.items()}
    criteria = [
        at_least("all-linear recovers the log-perplexity gap (worst seed)", min(recovered["linear"]), 0.90),
        at_least("25% kept recovers the log-perplexity gap (worst seed)", min(recovered["kept"]), 0.97),
        at_most("all-linear CE above the teacher's, nats (worst seed)", max(gaps["linear"]), 0.08),
        at_most("25% kept CE above the teacher's, nats (worst seed)", max(gaps["kept"]), 0.08),
        at_most("all-linear CE above the teacher's on text alone, nats (worst seed)", max(text_gaps["linear"]), 0.08),
        at_most("25% kept CE above the teacher's on text alone, nats (worst seed)", max(text_gaps["kept"]), 0.08),
        at_most(
            "all-linear CE minus no-align CE at equal tokens, both learning rates tuned (mean)", gap["linear"] - gap["no_align"], 0.0
        ),
        at_least("row-repeat CE minus by-heads CE (mean)", gap["rows"] - gap["linear"], 0.0),
        at_most("relative residual of every layer that does not retrieve, after align (worst seed)", max(worst_residual), 0.15),
    ]
    folder = out if options.quick else HERE
    write_results(
        folder,
        claim="a trained softmax model becomes a hybrid that keeps its quality",
        command="python experiments/hybrid_recovers/run.py" + (" --quick" if options.quick else ""),
        seeds=seeds,
        rows=rows,
        criteria=criteria,
    )
    for criterion in criteria:
        print(
            f"{'holds' if criterion['holds'] else 'FAILS'}  {criterion['measured']:.4f} {criterion['bound']}  {criterion['name']}"
        )
    print("mean share of the gap recovered:", {name: round(value, 4) for name, value in mean.items()}, f"lr {aligned_lr:g}, no-align {control_lr:g}")


if __name__ == "__main__":
    main()
