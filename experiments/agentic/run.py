"""A generator that reads the issue against one LoRA for all issues, both taught a bigger model's logits on agents' trajectories.

    python experiments/agentic/run.py            # two hours on one core (estimated)
    python experiments/agentic/run.py --quick    # the machinery in a minute; proves nothing

Every arm goes through the shipped engine.  A run that is interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np  # noqa: E402
from experiments.agentic.tasks import write_tasks  # noqa: E402
from experiments.common import Rows, as_rows, at_least, command_line, conclude  # noqa: E402

from limbeck.config.load import load_recipe  # noqa: E402
from limbeck.config.recipe import Recipe  # noqa: E402
from limbeck.evaluation.bootstrap import paired  # noqa: E402
from limbeck.stages.run import run_recipe  # noqa: E402

SHARED = HERE.parents[2] / "shared" / "data"
TARGETS = ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"]
REPOSITORIES, EACH = 40, 24
ARMS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "generated": ({"width": 64}, (5e-4, 1e-3)),
    "static": ({"condition": "none"}, (3e-3, 1e-2)),
}
"""Arm -> options of the generator, and the learning rates that are tried on the first seed."""
STEPS, ROWS = 100, 8
SPLITS = {"held_out_source": "held-out repositories", "seen": "repositories trained on"}


def ground(quick: bool, trajectories: Path) -> dict[str, Any]:
    """The stages of ``recipe.yaml`` with the trajectories' file; in the quick form small enough for a minute."""
    if not quick and not SHARED.is_dir():
        sys.exit(f"needs the shared test data beside the repository: {SHARED} is not there")
    stages = load_recipe(HERE / "recipe.yaml").model_dump(mode="json", by_alias=True)["stages"]
    del stages["export"]
    stages["windows"]["path"] = [str(trajectories)]
    if quick:
        stages["pretrain"]["data"]["source"] = [{"kind": "stdlib", "limit": 60}]
        stages["pretrain"]["data"]["held_out"] = 0.2
        for name in ("pretrain", "pretrain_teacher"):
            stages[name]["loop"] |= {"tokens": None, "steps": 2, "batch_tokens": 1024, "validate_every": None, "stop_unless": None}
        stages["teacher"]["loop"] |= {"epochs": None, "steps": 2, "batch_tokens": 1024, "validate_every": None}
        stages["signals"]["k"] = 16
    return stages


class Agentic:
    """Collects the stages of one run and runs them."""

    def __init__(self, out: Path, quick: bool):
        self.out, self.quick = out, quick
        trajectories = out / "trajectories.jsonl"
        if not trajectories.exists():
            write_tasks(trajectories, None if quick else SHARED, 6 if quick else REPOSITORIES, 3 if quick else EACH)
        self.stages = ground(quick, trajectories)
        self.k = self.stages["signals"]["k"]

    def arm(self, name: str, lr: float, seed: int) -> str:
        """A train stage; returns its name."""
        surgery = {"kind": "lora_generator", "targets": TARGETS, "rank": 8, "alpha": 16, **ARMS[name][0]}
        stage = f"{name}-{lr:g}-s{seed}"
        self.stages[stage] = {
            "data": {"from": "windows"},
            "student": {"base": {"from": "pretrain"}, "surgery": [surgery], "train": ["generator"]},
            "teacher": {"kind": "stored", "signals": {"from": "signals"}},
            "objectives": [{"kind": "topk_kl", "k": self.k}],
            "optim": {"groups": [{"lr": lr}], "schedule": {"warmup": 10, "final": 0.05}},
            "loop": {
                "steps": 2 if self.quick else STEPS,
                "batch_tokens": (2 if self.quick else ROWS) * self.stages["windows"]["sequence"],
                "validate_every": 2 if self.quick else 50,
                "validate_rows": 4 if self.quick else 48,
                "keep_last": 1,
            },
            "seed": seed,
        }
        return stage

    def judge(self, generated: str, static: str) -> str:
        """The stage that judges both arms of a seed."""
        stage = f"judge-{generated}"
        self.stages[stage] = {
            "kind": "evaluate_agent",
            "from": generated,
            "against": [static],
            "teacher": {"kind": "stored", "signals": {"from": "signals"}},
            "top_k": self.k,
            "issues": 3 if self.quick else 40,
            "rows": 1,
            "turns": 1,
            "new_tokens": 8 if self.quick else 96,
        }
        return stage

    def run(self) -> None:
        """Run what is not done yet."""
        run_recipe(Recipe.model_validate({"name": "agentic", "stages": self.stages}), recipe_dir=HERE, run_dir=self.out)

    def watched(self, stage: str) -> float:
        """KL to the teacher on held-out repositories at a training's last validation."""
        return json.loads((self.out / stage / "stage.json").read_text())["result"]["held_out/kl"]


def main() -> None:
    """Tune on the first seed, run both arms on all seeds, judge, write ``results.json``."""
    options = command_line(__doc__ or "", "agentic", seeds=(1, 2, 3))
    lab = Agentic(options.out, options.quick)
    first = options.seeds[0]
    tried = {arm: {lr: lab.arm(arm, lr, first) for lr in (rates[:1] if options.quick else rates)} for arm, (_, rates) in ARMS.items()}
    lab.run()
    best = {arm: min(stages, key=lambda lr, stages=stages: lab.watched(stages[lr])) for arm, stages in tried.items()}  # type: ignore[misc]
    found = []
    for seed in options.seeds:
        stages = {arm: lab.arm(arm, lr, seed) for arm, lr in best.items()}
        judged = lab.judge(stages["generated"], stages["static"])
        lab.run()
        names = {stages["generated"]: "generated", stages["static"]: "static", f"{stages['generated']}, shuffled": "shuffled", "base": "base"}
        found.append(renamed(json.loads((lab.out / judged / "evaluation" / "agent.json").read_text()), names))
    rows: Rows = []
    for seed, one in zip(options.seeds, found, strict=True):
        for split, words in SPLITS.items():
            for arm in ("base", "static", "shuffled", "generated"):
                rows += as_rows(f"{words}: {arm}", seed, numbers(one["splits"][split], arm))
    rows += [{"setting": f"learning rate of {arm}", "seed": first, "metric": "lr", "value": lr} for arm, lr in best.items()]
    conclude(
        HERE if not options.quick else options.out,
        "agentic: a generator that reads the issue follows the teacher better than one LoRA for all issues, on repositories it has never met",
        "python experiments/agentic/run.py",
        options.seeds,
        rows,
        criteria(found),
    )


def renamed(found: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Columns under the names of their arms."""
    for table in [*found["splits"].values(), *found["issues"]]:
        for key, value in table.items():
            if isinstance(value, dict) and set(value) <= set(names):
                table[key] = {names[name]: one for name, one in value.items()}
    return found


def numbers(table: dict[str, Any], arm: str) -> dict[str, float]:
    """What is measured of an arm on a split."""
    plain = {measure: table[measure][arm] for measure in ("nll", "kl", "agreement")}
    calls = {f"{kind} {part}": rate for kind in ("forced", "written") for part, rate in table.get(f"calls_{kind}", {}).get(arm, {}).items()}
    return plain | calls


def per_issue(found: list[dict[str, Any]], split: str, arm: str) -> np.ndarray:
    """KL of each issue of a split and seed, ``[issues, seeds]``."""
    return np.array([[row["measures"][arm]["kl"] for row in one["issues"] if row["split"] == split] for one in found]).T


def criteria(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leads in KL to the teacher, and tool calls, on held-out repositories."""
    held = "held_out_source"
    kl = {arm: per_issue(found, held, arm) for arm in ("base", "static", "shuffled", "generated")}
    lines = [
        at_least(f"lead of the generator over {words} in KL, nats a token, lower end of the 95% interval", paired(kl[arm] - kl["generated"]).low, 0.0)
        for arm, words in (("base", "the base"), ("static", "one static LoRA"), ("shuffled", "itself on shuffled issues"))
    ]
    name = float(np.mean([one["splits"][held]["calls_written"]["generated"]["name"] for one in found if one["splits"][held].get("calls_written")] or [0.0]))
    return [*lines, at_least("tools rightly named by the generator's LoRA when it writes the call itself", name, 0.5)]


if __name__ == "__main__":
    main()
