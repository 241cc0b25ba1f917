"""What Qwen3.5's own Gated DeltaNet costs in quality against our default one, at equal tokens, and that its export is exact.

    python experiments/native_cost/run.py            # an hour and a quarter on one core
    python experiments/native_cost/run.py --quick    # the machinery in a minute; proves nothing

Every arm goes through the shipped engine by `recipe.yaml` beside this file.  Both mixers have their learning rate tuned on the first
seed.  A run that is interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
from benchmarks.evidence import criterion, write_results  # noqa: E402
from experiments.common import measured, residuals  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from limbeck.config.load import load_recipe  # noqa: E402
from limbeck.config.recipe import Recipe  # noqa: E402
from limbeck.data.dataset import TokenRows  # noqa: E402
from limbeck.models.loading import load_model  # noqa: E402
from limbeck.stages.run import open_stage, run_recipe  # noqa: E402

ARMS = ("default", "native")
FACTORS = (0.3, 1.0, 3.0)
"""Of the recipe's mixer learning rates, in align and in distillation alike; the rest stays as it is."""
LR_ALIGN, LR_DISTIL = 3e-3, 1e-3
QUICK = [
    "align_default.data.source.0.limit=100", "text.data.source.limit=100",
    *(f"{stage}.loop.tokens=8k" for stage in ("align_default", "default", "align_native", "native")),
    "evaluate.rows=4", "text.rows=4", "evaluate.recall.rows=2",
]  # fmt: skip


def rates(arm: str, factor: float) -> list[str]:
    """Overrides that set an arm's mixer learning rates."""
    return [f"align_{arm}.optim.groups.0.lr={LR_ALIGN * factor:g}", f"{arm}.optim.groups.0.lr={LR_DISTIL * factor:g}"]


def seeded(seed: int, *more: str) -> Recipe:
    """The recipe with one seed in every stage."""
    stages = load_recipe(HERE / "recipe.yaml").stages
    return load_recipe(HERE / "recipe.yaml", [*(f"{name}.seed={seed}" for name in stages), *more])


def tune(arm: str, seed: int, more: list[str], out: Path) -> tuple[float, list[dict[str, Any]]]:
    """The factor with the lowest held-out cross-entropy on one seed, and what each gave."""
    rows = []
    for factor in FACTORS:
        tree = seeded(seed, *more, *rates(arm, factor)).model_dump(mode="json", by_alias=True)["stages"]
        data = tree["align_default"]["data"]
        stages = {name: {**tree[name], "data": data} for name in (f"align_{arm}", arm)}
        stages["evaluate"] = {**tree["evaluate"], "from": arm, "against": ["teacher"], "recall": None}
        recipe = Recipe.model_validate({"name": "tune", "stages": stages})
        run = run_recipe(recipe, recipe_dir=HERE, run_dir=out / f"tune-{arm}-{factor:g}")
        ce = measured(run, "evaluate")[arm]["ce"]
        rows.append({"setting": f"tune {arm}, learning rates x {factor:g}", "seed": seed, "metric": "ce", "value": ce})
    return FACTORS[min(range(len(FACTORS)), key=lambda i: rows[i]["value"])], rows


def stock_differences(run: Path) -> tuple[float, float]:
    """Largest difference of the export's logits in stock transformers from ours, over the largest logit, and the share of 50 greedy
    tokens that agree."""
    folder = run / "export" / "export" / "native"
    context = open_stage(run / "align_default")
    data, _ = context.data(context.options.data)
    ids = TokenRows(data, "held_out").batch([0, 1]).input_ids_BT
    save_file({"ids": ids.contiguous()}, run / "inputs.safetensors")
    words = [str(folder), str(run / "inputs.safetensors"), str(run / "stock.safetensors")]
    subprocess.run([sys.executable, "-I", str(HERE / "stock.py"), *words], check=True, cwd=run)
    theirs, student = load_file(run / "stock.safetensors"), load_model(str(run / "native" / "model"))
    with torch.no_grad():
        logits = student(input_ids=ids).logits
        greedy = student.generate(ids[:, :64], max_new_tokens=50, do_sample=False)
    same = greedy.shape == theirs["greedy"].shape and (greedy == theirs["greedy"])[:, 64:].double().mean().item()
    return ((logits - theirs["logits"]).abs().max() / logits.abs().max()).item(), float(same)


def main() -> None:
    """Tune both arms, run every seed, compare the export, and write results.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the machinery in a minute; one seed, few tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/native_cost"), help="where the runs go")
    options = parser.parse_args()
    seeds = options.seeds[:1] if options.quick else options.seeds
    out = (options.out / "quick" if options.quick else options.out).resolve()
    more, rows = list(QUICK if options.quick else []), []
    settings: list[str] = []
    for arm in ARMS:
        factor, tuned = (1.0, []) if options.quick else tune(arm, seeds[0], more, out)
        rows += tuned
        settings += rates(arm, factor)
    costs: dict[str, list[float]] = {metric: [] for metric in ("ce", "kl", "text ce", "repeat 256")}
    above, different, agreeing = [], [], []
    for seed in seeds:
        run = run_recipe(seeded(seed, *more, *settings), recipe_dir=HERE, run_dir=out / f"seed-{seed}")
        mixed, text = measured(run, "evaluate"), measured(run, "text")
        for label, found in (("text and recall", mixed), ("text", text)):
            for name, values in found.items():
                rows += [{"setting": f"{label}: {name}", "seed": seed, "metric": m, "value": v} for m, v in values.items()]
        for arm in ARMS:
            layers = residuals(run, f"align_{arm}").items()
            rows += [{"setting": f"align, {arm}", "seed": seed, "metric": f"residual/{layer}", "value": v} for layer, v in layers]
        costs["ce"].append(mixed["native"]["ce"] - mixed["default"]["ce"])
        costs["kl"].append(mixed["native"]["kl"] - mixed["default"]["kl"])
        costs["text ce"].append(text["native"]["ce"] - text["default"]["ce"])
        costs["repeat 256"].append(mixed["native"]["recall/repeat/256"] - mixed["default"]["recall/repeat/256"])
        above.append(mixed["native"]["ce"] - mixed["teacher"]["ce"])
        difference, same = stock_differences(run)
        different.append(difference)
        agreeing.append(same)
    for metric, values in costs.items():
        rows += [{"setting": "native minus default", "seed": s, "metric": metric, "value": v} for s, v in zip(seeds, values, strict=True)]
    criteria = [
        criterion("stock transformers' logits differ from ours, over the largest logit (worst seed)", "<= 1e-05", max(different), max(different) <= 1e-5),
        criterion("share of 50 greedy tokens that stock transformers generates alike (worst seed)", ">= 1.0", min(agreeing), min(agreeing) >= 1),
        criterion("native hybrid's CE above the teacher's, nats (worst seed)", "<= 0.08", max(above), max(above) <= 0.08),
    ]
    write_results(
        out if options.quick else HERE,
        claim="a hybrid of the native preset is served by stock transformers as it is, at a small cost in quality",
        command="python experiments/native_cost/run.py" + (" --quick" if options.quick else ""),
        seeds=seeds,
        rows=rows,
        criteria=criteria,
    )
    for c in criteria:
        print(f"{'holds' if c['holds'] else 'FAILS'}  {c['measured']:.3g} {c['bound']}  {c['name']}")
    print("native minus default, mean:", {name: round(statistics.mean(values), 5) for name, values in costs.items()}, settings)


if __name__ == "__main__":
    main()
