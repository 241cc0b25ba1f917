"""What becomes of the mass that a truncated teacher signal leaves out: k x tail x temperature, three seeds.

    python experiments/tail_matters/run.py            # about forty minutes on two cores
    python experiments/tail_matters/run.py --quick    # the machinery in a minute; proves nothing

The student is the quickstart's hybrid (two of eight layers softmax), aligned once a seed; every arm goes on from there for the
same tokens in the same order.  The measure is the dense KL to the teacher on held-out text, beside cross-entropy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from benchmarks.evidence import criterion, write_results  # noqa: E402

from limbeck.config.load import load_recipe  # noqa: E402
from limbeck.config.recipe import Recipe  # noqa: E402
from limbeck.stages.run import run_recipe  # noqa: E402

KEPT = (8, 32, 128)
TAILS = ("tail", "zero", "renorm_both")
TEMPERATURES = (1, 2)


def arms() -> Iterator[tuple[str, str]]:
    """``(setting, objectives)`` of every arm."""
    yield "ce only", "[{kind: ce}]"
    for temperature in TEMPERATURES:
        yield f"dense, T={temperature}", f"[{{kind: kl, temperature: {temperature}}}]"
        for k in KEPT:
            for tail in TAILS:
                options = f"kind: topk_kl, k: {k}, tail: {tail}, temperature: {temperature}"
                yield f"k={k}, {tail}, T={temperature}", f"[{{{options}}}]"


def arm_name(setting: str) -> str:
    """A stage's name for a setting."""
    return setting.replace(", ", "-").replace("=", "").replace(" ", "_")


def all_arms(chosen: list[tuple[str, str]], seed: int, quick: bool) -> Recipe:
    """One recipe with every arm of a seed: align once, and what is done is not done again."""
    short = ["align.loop.tokens=8k", "distil.loop.tokens=8k", "evaluate.rows=4"] if quick else []
    seeds = [f"{stage}.seed={seed}" for stage in ("align", "distil")]
    tree = load_recipe(HERE / "recipe.yaml", [*seeds, *short]).model_dump(mode="json", by_alias=True)["stages"]
    stages: dict[str, Any] = {"align": tree["align"]}
    for setting, objectives in chosen:
        name = arm_name(setting)
        stages[name] = {**tree["distil"], "objectives": yaml.safe_load(objectives)}
        stages[f"evaluate-{name}"] = {**tree["evaluate"], "from": name}
    stages["evaluate-align"] = {**tree["evaluate"], "from": "align"}
    return Recipe.model_validate({"name": "tail_matters", "stages": stages})


def measured(run: Path, setting: str) -> dict[str, float]:
    """What the evaluate stage found about the student: held-out cross-entropy, KL to the teacher and agreement with it."""
    found = json.loads((run / f"evaluate-{arm_name(setting)}" / "evaluation" / "evaluation.json").read_text())
    student = found["student"]
    divergence = found.get("divergence", {}).get(student, {})
    return {"ce": found["perplexity"][student]["ce"], **{key: divergence[key] for key in ("kl", "agreement") if key in divergence}}


def main() -> None:
    """Run what is not done yet, and write results.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the machinery; one seed, three arms, few tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/tail_matters"), help="where the runs go")
    options = parser.parse_args()
    seeds = options.seeds[:1] if options.quick else options.seeds
    out = options.out / "quick" if options.quick else options.out
    chosen = [arm for arm in arms() if not options.quick or arm[0] in ("ce only", "dense, T=1", "k=8, tail, T=1", "k=8, zero, T=1")]

    rows: list[dict[str, Any]] = []
    for seed in seeds:
        run = run_recipe(all_arms(chosen, seed, options.quick), recipe_dir=HERE, run_dir=out / f"seed-{seed}")
        for setting in ["align", *(setting for setting, _ in chosen)]:
            values = measured(run, setting)
            rows += [{"setting": setting, "seed": seed, "metric": metric, "value": value} for metric, value in values.items()]
            print(f"seed {seed}  {setting:24}  " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()), flush=True)

    def mean(setting: str, metric: str) -> float:
        return statistics.mean(row["value"] for row in rows if row["setting"] == setting and row["metric"] == metric)

    def worse(other: str, ours: str, metric: str) -> float:
        """The smallest advantage over the seeds."""
        values = {
            (row["setting"], row["seed"]): row["value"] for row in rows if row["metric"] == metric and row["setting"] in (other, ours)
        }
        return min(values[other, seed] - values[ours, seed] for seed in seeds)

    settings = {setting for setting, _ in chosen}
    criteria = []
    for temperature in TEMPERATURES:
        ours = f"k=8, tail, T={temperature}"
        for tail in TAILS[1:]:
            other = f"k=8, {tail}, T={temperature}"
            if {ours, other} <= settings:
                gain = worse(other, ours, "kl")
                criteria.append(criterion(f"held-out KL of '{other}' minus '{ours}' (worst seed)", "> 0", gain, gain > 0))
    gain = worse("ce only", "k=8, tail, T=1", "ce")
    criteria.append(criterion("held-out CE of CE-only minus 'k=8, tail, T=1' at equal steps (worst seed)", "> 0", gain, gain > 0))
    write_results(
        out if options.quick else HERE,
        claim="a tail bucket keeps a truncated teacher signal right where zeroing or renormalising does not",
        command="python experiments/tail_matters/run.py" + (" --quick" if options.quick else ""),
        seeds=seeds,
        rows=rows,
        criteria=criteria,
    )
    for found in criteria:
        print(f"{'holds' if found['holds'] else 'FAILS'}  {found['measured']:.4f} {found['bound']}  {found['name']}")


if __name__ == "__main__":
    main()
