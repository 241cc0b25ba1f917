"""What becomes of the mass that a truncated teacher signal leaves out: k x tail x temperature, three seeds.

    python experiments/tail_matters/run.py                      # half an hour on one core; writes results.json
    python experiments/tail_matters/run.py --student far        # twenty-five minutes more; writes far/results.json
    python experiments/tail_matters/run.py --quick              # the machinery in a minute; proves nothing

Two students.  One is the quickstart's hybrid (two of eight layers softmax), aligned once a seed: close to its teacher.  The other
has every head scrambled: it begins far away.  Every arm trains for the same tokens in the same order.  The measure is the dense KL to
the teacher on held-out text, beside cross-entropy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
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
QUICK_ARMS = ("ce only", "dense, T=1", "k=8, tail, T=1", "k=8, zero, T=1")
STUDENTS = {"aligned": ("recipe.yaml", KEPT, HERE), "far": ("far/recipe.yaml", (8,), HERE / "far")}
"""Student -> its recipe, the numbers of kept ids that it is tried with, and where its results go."""


def arms(kept: Sequence[int]) -> Iterator[tuple[str, str]]:
    """``(setting, objectives)`` of every arm."""
    yield "ce only", "[{kind: ce}]"
    for temperature in TEMPERATURES:
        yield f"dense, T={temperature}", f"[{{kind: kl, temperature: {temperature}}}]"
        for k in kept:
            for tail in TAILS:
                options = f"kind: topk_kl, k: {k}, tail: {tail}, temperature: {temperature}"
                yield f"k={k}, {tail}, T={temperature}", f"[{{{options}}}]"


def arm_name(setting: str) -> str:
    """A stage's name for a setting."""
    return setting.replace(", ", "-").replace("=", "").replace(" ", "_")


def all_arms(file: str, chosen: list[tuple[str, str]], seed: int, quick: bool) -> Recipe:
    """One recipe with every arm of a student and a seed, after what they share."""
    stages = load_recipe(HERE / file).stages
    shared = [name for name in stages if name not in ("distil", "evaluate")]
    trained = [name for name, stage in stages.items() if stage.kind == "train"]
    short = [*(f"{name}.loop.tokens=8k" for name in trained), "evaluate.rows=4"] if quick else []
    seeds = [f"{name}.seed={seed}" for name in trained]
    tree = load_recipe(HERE / file, [*seeds, *short]).model_dump(mode="json", by_alias=True)["stages"]
    found: dict[str, Any] = {name: tree[name] for name in shared}
    for setting, objectives in chosen:
        found[arm_name(setting)] = {**tree["distil"], "objectives": yaml.safe_load(objectives)}
    measured = [*(name for name in shared if name in trained), *(arm_name(setting) for setting, _ in chosen)]
    found |= {f"evaluate-{name}": {**tree["evaluate"], "from": name} for name in measured}
    return Recipe.model_validate({"name": "tail_matters", "stages": found})


def measured(run: Path, stage: str) -> dict[str, float]:
    """What an evaluate stage found about the student: held-out cross-entropy, KL to the teacher and agreement with it."""
    found = json.loads((run / stage / "evaluation" / "evaluation.json").read_text())
    student = found["student"]
    divergence = found.get("divergence", {}).get(student, {})
    return {"ce": found["perplexity"][student]["ce"], **{key: divergence[key] for key in ("kl", "agreement") if key in divergence}}


def main() -> None:
    """Run what is not done yet, and write results.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the machinery; one seed, four arms, few tokens")
    parser.add_argument("--student", choices=list(STUDENTS), default="aligned")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/tail_matters"), help="where the runs go")
    options = parser.parse_args()
    seeds = options.seeds[:1] if options.quick else options.seeds
    out = options.out / "quick" if options.quick else options.out
    file, kept, folder = STUDENTS[options.student]
    chosen = [arm for arm in arms(kept) if not options.quick or arm[0] in QUICK_ARMS]
    names = {arm_name(setting): setting for setting, _ in chosen}

    rows: list[dict[str, Any]] = []
    for seed in seeds:
        recipe = all_arms(file, chosen, seed, options.quick)
        run = run_recipe(recipe, recipe_dir=HERE, run_dir=out / f"{options.student}-{seed}")
        for stage in filter(lambda name: name.startswith("evaluate-"), recipe.stages):
            name = stage.removeprefix("evaluate-")
            setting, values = names.get(name, name), measured(run, stage)
            rows += [{"setting": setting, "seed": seed, "metric": metric, "value": value} for metric, value in values.items()]
            print(f"seed {seed}  {setting:24}  " + "  ".join(f"{key} {value:.4f}" for key, value in values.items()), flush=True)

    def worse(other: str, ours: str, metric: str) -> float:
        """The smallest advantage over the seeds."""
        values = {
            (row["setting"], row["seed"]): row["value"] for row in rows if row["metric"] == metric and row["setting"] in (other, ours)
        }
        return min(values[other, seed] - values[ours, seed] for seed in seeds)

    found = {row["setting"] for row in rows}
    criteria = []
    for temperature in TEMPERATURES:
        ours = f"k=8, tail, T={temperature}"
        for tail in TAILS[1:]:
            other = f"k=8, {tail}, T={temperature}"
            if {ours, other} <= found:
                gain = worse(other, ours, "kl")
                criteria.append(criterion(f"held-out KL of '{other}' minus '{ours}' (worst seed)", "> 0", gain, gain > 0))
    for ours in ("k=8, tail, T=1", "dense, T=1"):
        gain = worse("ce only", ours, "ce")
        criteria.append(criterion(f"held-out CE of CE-only minus '{ours}' at equal steps (worst seed)", "> 0", gain, gain > 0))
    write_results(
        out if options.quick else folder,
        claim="a tail bucket keeps a truncated teacher signal right where zeroing or renormalising does not",
        command=f"python experiments/tail_matters/run.py --student {options.student}" + (" --quick" if options.quick else ""),
        seeds=seeds,
        rows=rows,
        criteria=criteria,
    )
    for line in criteria:
        print(f"{'holds' if line['holds'] else 'FAILS'}  {line['measured']:.4f} {line['bound']}  {line['name']}")


if __name__ == "__main__":
    main()
