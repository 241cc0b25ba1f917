"""Which layers of a hybrid stay softmax: every method, controls and the exhaustive oracle, five seeds.

    python experiments/layer_selection/run.py            # an hour and ten minutes on one core
    python experiments/layer_selection/run.py --quick    # the machinery in a minute; proves nothing

The teacher, `builtin:code-2m`, has two layers that look back, 6 and 7.  A run that is interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from benchmarks.evidence import criterion, write_results  # noqa: E402

from limbeck.config.load import load_recipe  # noqa: E402
from limbeck.config.recipe import Recipe  # noqa: E402
from limbeck.evaluation.ranking.orders import by_importance, random_sets, spearman, uniform_set  # noqa: E402
from limbeck.stages.run import run_recipe  # noqa: E402

QUICK = [
    "align.data.source.0.limit=100", "align.loop.validate_rows=2",
    "align.loop.tokens=8k", "full.distil.loop.tokens=8k", "full.distil.rungs=2", "cheap.distil.loop.tokens=8k", "sets.distil.loop.tokens=4k",
    *(f"{stage}.{word}" for stage in ("full", "cheap", "sets") for word in ("keep=1", "rows=2", "recall.rows=1", "recall.distances=[32]")),
]  # fmt: skip
RANDOM = 5
"""Random sets a seed."""
LAYERS = 8


def seeded(seed: int, more: list[str]) -> Recipe:
    """The recipe with one seed in every stage."""
    stages = load_recipe(HERE / "recipe.yaml").stages
    return load_recipe(HERE / "recipe.yaml", [*(f"{name}.seed={seed}" for name in stages), *more])


def ranking(run: Path, stage: str) -> dict[str, Any]:
    """What a rank_layers stage found."""
    return json.loads((run / stage / "ranking" / "ranking.json").read_text())


def orders(run: Path) -> dict[str, list[int]]:
    """Every method's order of the layers, also that of the text part of the free score alone."""
    full, cheap = ranking(run, "full"), ranking(run, "cheap")
    found = {name: method["order"] for name, method in full["methods"].items()}
    found |= {f"cheap {name}": cheap["methods"][name]["order"] for name in ("greedy", "ga_s2")}
    text = {int(layer): -score["text"] for layer, score in full["methods"]["restore_one"]["scores"].items()}
    return {**found, "restore_one, text alone": by_importance(text)}


def costs(run: Path) -> dict[str, int]:
    """Tokens of each method: teacher, training and scoring; `cheap` is all that its stage does before it compares sets."""
    full, cheap = ranking(run, "full"), ranking(run, "cheap")
    found = {name: method["tokens"]["all"] for name, method in full["methods"].items()}
    return {**found, "ga_s2": full["methods"]["ga_s2"]["full_tokens"]["all"], "cheap": cheap["tokens"]["ranking"] + cheap["tokens"]["teacher"]}


def resumed_is_identical(recipe: Recipe, run: Path, out: Path) -> bool:
    """Whether the cheap ranking, killed in the middle of its ledger, goes on to the same bytes."""
    copy = out / "killed"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("full", "sets", "LOCK"))
    ledger, record = copy / "cheap" / "ranking" / "ledger.jsonl", copy / "cheap" / "stage.json"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[: len(lines) // 2]) + lines[len(lines) // 2][:20])
    (copy / "cheap" / "ranking" / "ranking.json").unlink()
    record.write_text(json.dumps({**json.loads(record.read_text()), "status": "running"}))
    run_recipe(recipe, recipe_dir=HERE, run_dir=copy, stage="cheap")
    same = (copy / "cheap" / "ranking" / "ranking.json").read_bytes() == (run / "cheap" / "ranking" / "ranking.json").read_bytes()
    shutil.rmtree(copy)
    return same


def main() -> None:
    """Run every seed and write results.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the machinery in a minute; one seed, one layer kept, few tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, default=Path("runs/layer_selection"), help="where the runs go")
    options = parser.parse_args()
    seeds = options.seeds[:1] if options.quick else options.seeds
    out = options.out / "quick" if options.quick else options.out

    rows: list[dict[str, Any]] = []
    correlation: dict[str, list[float]] = {}
    share: dict[str, list[float]] = {}
    excess: dict[str, list[float]] = {}
    wins, same = [], True
    for seed in seeds:
        recipe = seeded(seed, QUICK if options.quick else [])
        run = run_recipe(recipe, recipe_dir=HERE, run_dir=out / f"seed-{seed}")
        found, tokens, keep = orders(run), costs(run), recipe.stages["full"].keep
        measured = {tuple(row["layers"]): row for row in ranking(run, "sets")["oracle"]["sets"]}
        best = min(row["score"] for row in measured.values())
        chosen = {name: tuple(sorted(order[:keep])) for name, order in found.items()} | {"uniform": tuple(uniform_set(LAYERS, keep))}
        chosen |= {f"random {i}": tuple(layers) for i, layers in enumerate(random_sets(LAYERS, keep, RANDOM, seed), 1)}
        chosen["oracle"] = min(measured, key=lambda layers: measured[layers]["score"])
        for name, layers in chosen.items():
            row = measured[layers]
            rows.append({"setting": name, "seed": seed, "metric": "layers", "value": " ".join(map(str, layers))})
            rows += [{"setting": name, "seed": seed, "metric": metric, "value": row[metric]} for metric in ("score", "kl", "recall_kl", "recall")]
            excess.setdefault(name, []).append(row["score"] / best - 1)
        for name, order in found.items():
            correlation.setdefault(name, []).append(spearman(order, found["ga_s2"]))
            rows.append({"setting": name, "seed": seed, "metric": "spearman with ga_s2", "value": correlation[name][-1]})
            rows.append({"setting": name, "seed": seed, "metric": "order", "value": " ".join(map(str, order))})
        for name, spent in tokens.items():
            share.setdefault(name, []).append(spent / tokens["ga_s2"])
            rows.append({"setting": name, "seed": seed, "metric": "tokens", "value": spent})
        controls = [measured[chosen[f"random {i}"]] for i in range(1, 1 + sum(name.startswith("random ") for name in chosen))]
        ours, uniform = measured[chosen["cheap greedy"]], measured[chosen["uniform"]]
        wins.append(
            ours["score"] < min(uniform["score"], statistics.mean(row["score"] for row in controls))
            and ours["recall"] >= max(uniform["recall"], statistics.mean(row["recall"] for row in controls))
        )
        if seed == seeds[0]:
            same = resumed_is_identical(recipe, run, out)
        print(f"seed {seed}  " + "; ".join(f"{name}: {' '.join(map(str, order))}" for name, order in found.items()), flush=True)
    mean = {name: statistics.mean(values) for name, values in correlation.items()}
    criteria = [
        criterion(
            "seeds in which the cheap choice beats uniform and the mean of 5 random sets, KL and recall",
            f">= {max(1, len(seeds) - 1)} of {len(seeds)}", sum(wins), sum(wins) >= max(1, len(seeds) - 1),
        ),
        criterion("score of the cheap choice above the exhaustive oracle's (mean)", "<= 0.05", e := statistics.mean(excess["cheap greedy"]), e <= 0.05),
        criterion("tokens of the cheap choice as a share of full GA-S2's (worst seed)", "<= 0.1", t := max(share["cheap"]), t <= 0.1),
        criterion("rank correlation of the cheap order with full GA-S2's (mean)", ">= 0.8", mean["cheap ga_s2"], mean["cheap ga_s2"] >= 0.8),
        criterion("a killed and resumed ranking is byte for byte the same", "= 1", int(same), same),
    ]  # fmt: skip
    write_results(
        out if options.quick else HERE,
        claim="which layers stay softmax is found at a tenth of the price of a distillation for each layer",
        command="python experiments/layer_selection/run.py" + (" --quick" if options.quick else ""),
        seeds=seeds,
        rows=rows,
        criteria=criteria,
    )
    for name, value in mean.items():
        print(f"{name:24}  spearman {value:6.3f}  above the oracle {100 * statistics.mean(excess[name]):6.1f}%")
    for name, values in share.items():
        print(f"{name:24}  {100 * statistics.mean(values):5.1f}% of full GA-S2's tokens")
    for line in criteria:
        print(f"{'holds' if line['holds'] else 'FAILS'}  {line['measured']:.4f} {line['bound']}  {line['name']}")


if __name__ == "__main__":
    main()
