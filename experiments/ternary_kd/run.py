"""Ternary experts under a teacher and without, beside full precision; what shares a scale; lambda's warm-up for a pretrained start.

    python experiments/ternary_kd/run.py            # an hour of one core
    python experiments/ternary_kd/run.py --quick    # the machinery in a minute; proves nothing

Every arm goes through the shipped engine.  A run that is interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.common import Rows, as_rows, at_least, at_most, command_line, conclude, measured  # noqa: E402

from limbeck.config.load import load_recipe  # noqa: E402
from limbeck.config.parts.stages import GgufOptions  # noqa: E402
from limbeck.config.recipe import Recipe  # noqa: E402
from limbeck.stages.export import export_path  # noqa: E402
from limbeck.stages.run import run_recipe  # noqa: E402

STEPS, LAMBDA = 200, 70
FRESH, PRETRAINED = "fresh", "teacher"
RATES = {FRESH: 3e-3, PRETRAINED: 1e-3}
"""AdamW's learning rate by where an arm begins; not tuned."""
MUON = [{"role": "ternary", "kind": "muon", "lr": 0.02, "weight_decay": 0.1}, {"kind": "lion", "lr": 3e-4}]
ARMS: dict[str, tuple[str, str | None, bool, int]] = {
    "full precision, CE": (FRESH, None, False, 0),
    "full precision, KD": (FRESH, None, True, 0),
    "ternary by row, CE": (FRESH, "row", False, 0),
    "ternary by row, KD": (FRESH, "row", True, 0),
    "ternary by expert, KD": (FRESH, "expert", True, 0),
    "ternary by tensor, KD": (FRESH, "tensor", True, 0),
    "pretrained, KD, no warm-up": (PRETRAINED, "row", True, 0),
    "pretrained, KD, lambda in 70 steps": (PRETRAINED, "row", True, LAMBDA),
}
"""Arm -> where it begins, what shares a scale (None: full precision), whether the teacher is asked, steps of lambda's warm-up."""
BY_MUON = {f"{arm}, Muon and Lion": arm for arm in ("ternary by row, CE", "ternary by row, KD")}
"""Two of the arms with the plan's optimisers, at the plan's rate for Muon and one above its own for Lion."""


class Lab:
    """Collects the stages of one run and runs them."""

    def __init__(self, out: Path, quick: bool):
        self.out, self.quick = out, quick
        self.stages: dict[str, Any] = load_recipe(HERE / "recipe.yaml").model_dump(mode="json", by_alias=True)["stages"]
        self.judging = self.stages.pop("evaluate")
        if quick:
            self.stages["teacher"]["data"] |= {"source": [{"kind": "stdlib", "limit": 40}], "held_out": 0.2}
            self.stages["teacher"]["loop"] |= {"steps": 4, "batch_tokens": 256, "validate_every": None}
            self.judging |= {"rows": 4}

    def start(self, seed: int) -> str:
        """Weights as they are drawn: a stage of one step that moves nothing."""
        name = f"fresh-s{seed}"
        teacher = self.stages["teacher"]
        loop = {"steps": 1, "batch_tokens": 128 if self.quick else 2048}
        self.stages[name] = {
            "data": {"from": "teacher"}, "student": teacher["student"], "optim": {"groups": [{"lr": 1e-30}]}, "loop": loop, "seed": seed,
        }  # fmt: skip
        return name

    def arm(self, arm: str, lr: float, seed: int, groups: list[dict[str, Any]] | None = None) -> str:
        """A train stage; returns its name."""
        begins, scale, taught, warmup = ARMS[BY_MUON.get(arm, arm)]
        name = f"{arm.replace(', ', '-').replace(' ', '_')}-{lr:g}-s{seed}"
        base = self.start(seed) if begins == FRESH else "teacher"
        surgery = [] if scale is None else [{"kind": "ternarize", "plan": "moe_experts", "scale": scale, "warmup": min(warmup, 2) if self.quick else warmup}]
        objectives: list[dict[str, Any]] = [{"kind": "ce", "weight": 0.5 if taught else 1.0}]
        objectives += [{"kind": "topk_kl", "weight": 0.5, "k": 64, "temperature": 2}] if taught else []
        objectives += [{"kind": "moe_balance", "weight": 0.01}, {"kind": "router_entropy", "weight": 0.001}]
        self.stages[name] = {
            "data": {"from": "teacher"},
            "student": {"base": {"from": base}, "surgery": surgery},
            "teacher": {"kind": "local", "model": {"from": "teacher"}} if taught else None,
            "objectives": objectives,
            "optim": {
                "groups": groups or [{"lr": lr, "weight_decay": 0.1}],
                "schedule": {"kind": "wsd", "warmup": 10, "final": 0.1, "decay": 0.2},
            },
            "loop": {
                "steps": 4 if self.quick else STEPS,
                "batch_tokens": 256 if self.quick else 2048,
                "validate_every": 4 if self.quick else 100,
                "validate_rows": 4 if self.quick else 64,
                "keep_last": 1,
            },
            "seed": seed,
        }
        return name

    def judge(self, names: list[str], seed: int) -> str:
        """The stage that measures a seed's students on held-out text, and the teacher."""
        stage = f"evaluate-s{seed}"
        # The teacher of the first one is the teacher of all.
        self.stages[stage] = {**self.judging, "from": names[0], "against": [*names[1:], "teacher"]}
        return stage

    def run(self) -> None:
        """Run what is not done yet."""
        run_recipe(Recipe.model_validate({"name": "ternary_kd", "stages": self.stages}), recipe_dir=HERE, run_dir=self.out)

    def last(self, stage: str) -> dict[str, float]:
        """What a training's last line says of routers and codes."""
        lines = [json.loads(line) for line in (self.out / stage / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if "losses" in line][-1]
        return {name: last[name] for name in ("router/idle", "router/cv", "ternary/zeros", "ternary/flips") if name in last}


def exported(run: Path, stage: str) -> dict[str, float]:
    """A student as a TQ2_0 file in llama.cpp against torch with llama.cpp's rounding; empty without llama.cpp."""
    if find_spec("xllamacpp") is None:
        return {}
    out = run / stage / "student.gguf"
    export_path(str(run / stage), output=out, gguf=GgufOptions(type="tq2_0", verify=True), say=lambda line: None)
    found = json.loads(next(out.parent.glob("student*.json")).read_text())["verification"]
    return {f"export: {name}": float(value) for name, value in found.items() if isinstance(value, int | float) and not isinstance(value, bool)}


def main() -> None:
    """Run all arms on all seeds, judge, write ``results.json``."""
    options = command_line(__doc__ or "", "ternary_kd", seeds=(1, 2, 3))
    lab = Lab(options.out, options.quick)
    rows: Rows = []
    found: list[dict[str, dict[str, float]]] = []
    for seed in options.seeds:
        names = {arm: lab.arm(arm, RATES[begins], seed) for arm, (begins, *_) in ARMS.items()} 
        names |= {arm: lab.arm(arm, 0.02, seed, MUON) for arm in BY_MUON}
        taught = [arm for arm in names if "KD" in arm]
        ordered = [*taught, *(arm for arm in names if arm not in taught)]
        judged = lab.judge([names[arm] for arm in ordered], seed)
        lab.run()
        numbers = measured(lab.out, judged)
        table = {"teacher": numbers["teacher"]} | {arm: numbers[names[arm]] | lab.last(names[arm]) for arm in names}
        table["ternary by row, KD"] |= exported(lab.out, names["ternary by row, KD"])
        found.append(table)
        for arm, values in table.items():
            rows += as_rows(arm, seed, values)
    conclude(
        options.out if options.quick else HERE,
        "ternary experts taught by a full-precision model are better than ternary experts without a teacher, and no worse than full precision taught alike",
        "python experiments/ternary_kd/run.py",
        options.seeds,
        rows,
        criteria(found),
    )


def criteria(found: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """By held-out cross-entropy, worst seed first."""

    def lead(better: str, worse: str) -> list[float]:
        return [one[worse]["ce"] - one[better]["ce"] for one in found]

    row = "ternary by row, KD"
    gains = {"AdamW": lead(row, "ternary by row, CE"), "Muon and Lion": lead(*reversed(BY_MUON))}
    ternary = [arm for arm in found[0] if "ternary" in arm or "pretrained" in arm]
    idle, uneven = (max(one[arm][name] for one in found for arm in ternary) for name in ("router/idle", "router/cv"))
    warmed = lead("pretrained, KD, lambda in 70 steps", "pretrained, KD, no warm-up")
    lines = []
    for name, gain in gains.items():
        twice = f"twice that gain's standard deviation over the seeds ({name}), nats; the bound is the worst seed's gain"
        lines += [
            at_least(f"nats a token by which ternary experts gain from the teacher ({name}), worst seed", min(gain), 0.05),
            at_most(twice, 2 * spread(gain), min(gain)),
        ]
    lines += [
        at_most("nats a token that ternary experts cost under the teacher, mean", statistics.mean(lead("full precision, KD", row)), 0.05),
        at_least("nats a token by which lambda's warm-up helps a pretrained start, worst seed", min(warmed), 0.0),
        at_most("experts that no token chose, in any ternary arm", idle, 0),
        at_most("standard deviation of the experts' load over its mean, worst ternary arm", uneven, 0.3),
    ]
    if "export: median" in found[0][row]:
        lines.append(at_most("median difference of the file in llama.cpp from torch, nats, worst seed", max(one[row]["export: median"] for one in found), 1e-5))
    return lines


def spread(values: list[float]) -> float:
    """Standard deviation over the seeds; of one seed 0."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
