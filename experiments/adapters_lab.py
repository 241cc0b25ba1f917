"""Pools, deltas and generators on the ground of ``adapters_lab.yaml``, for the experiments about LoRA generators.

All of them work in one run directory: what two of them need is made once.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from experiments.common import Rows, as_rows

from limbeck.config.load import load_recipe
from limbeck.config.recipe import Recipe
from limbeck.stages.run import run_recipe

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared" / "data"
SHAPE = {"targets": "all", "rank": 4, "alpha": 8}
Tree = dict[str, Any]


def ground(quick: bool) -> Tree:
    """The stages of the yaml; in the quick form the shipped base and text that every machine has."""
    if quick:
        conditions = {
            "kind": "prepare_conditions",
            "tokenizer": "builtin:code-2m",
            "sources": [{"name": "stdlib", "source": {"kind": "stdlib", "limit": 150}, "cut": 300, "slices": {"by": "topic", "count": 4}}],
            "formats": ["plain", "upper", "no_spaces"],
            "examples": 24,
            "test_examples": 6,
            "min_examples": 8,
            "held_out": {"slices": 2},
            "sequence": 32,
            "condition": {"form": "prompt_answer", "texts": 2, "tokens": 12},
        }
        return {"conditions": conditions}
    if not SHARED.is_dir():
        sys.exit(f"needs the shared test data beside the repository: {SHARED} is not there")
    return load_recipe(HERE / "adapters_lab.yaml").model_dump(mode="json", by_alias=True)["stages"]


class Lab:
    """Collects stages and runs them."""

    def __init__(self, out: Path, quick: bool):
        self.quick, self.out = quick, out
        self.stages = ground(quick)
        self.base: Any = "builtin:code-2m" if quick else {"from": "pretrain"}

    def pool(self, seed: int, init: str = "independent", inits: int = 1, splits: Sequence[str] = ()) -> str:
        """LoRAs for all conditions, or those of ``splits`` (several for each seen one, if ``inits`` says so); returns the stage's name."""
        splits = ("seen",) if inits > 1 else splits
        name = f"pool-{init}{f'-x{inits}' if inits > 1 else ''}{'-some' if splits and inits == 1 else ''}-s{seed}"
        self.stages[name] = {
            "kind": "train_adapters",
            "base": self.base,
            "conditions": {"from": "conditions"},
            "adapters": {**SHAPE, "init": init},
            "optim": {"groups": [{"lr": 5e-3}], "schedule": {"warmup": 10, "final": 0.1}, "clip": None},
            "loop": {"steps": 2 if self.quick else 150, "rows": 2, "together": 32, "keep_last": 1},
            "seed": seed,
            **({"inits": inits} if inits > 1 else {}),
            **({"splits": list(splits)} if splits else {}),
        }
        return name

    def deltas(self, pool: str, label: str = "", **changes: Any) -> str:
        """Deltas of a pool: by default every token of snippets of the conditions' training text; returns the stage's name."""
        name = f"deltas{label}-{pool.removeprefix('pool-')}"
        count, length = (2, 16) if self.quick else (12, 48)
        probes = {"kind": "conditions", "conditions": {"from": "conditions"}, "count": count, "length": length}
        self.stages[name] = {"kind": "measure_deltas", "pool": {"from": pool}, **({} if changes.get("paper") else {"probes": probes}), **changes}
        return name

    def generator(
        self,
        name: str,
        objectives: list[Tree],
        *,
        seed: int,
        pool: str | None = None,
        deltas: str | None = None,
        lr: float = 1e-3,
        steps: int = 400,
        rows: int = 16,
        surgery: Tree | None = None,
    ) -> str:
        """A generator's train stage; cross-entropy on test text of seen conditions is watched.  Returns the stage's name."""
        name = f"{name}-s{seed}"
        sequence = self.stages["conditions"]["sequence"]
        watched = [] if any(o["kind"] == "ce" for o in objectives) else [{"kind": "ce", "weight": 0}]
        stage: Tree = {
            "data": {"from": "conditions"},
            "student": {"base": self.base, "surgery": [{"kind": "lora_generator", **SHAPE, "width": 128, **(surgery or {})}], "train": ["generator"]},
            "objectives": [*objectives, *watched],
            "optim": {"groups": [{"lr": lr}], "schedule": {"warmup": 20, "final": 0.05}},
            "loop": {
                "steps": 2 if self.quick else steps,
                "batch_tokens": (2 if self.quick else rows) * sequence,
                "validate_every": 2 if self.quick else 100,
                "validate_rows": 4 if self.quick else 64,
                "log_every": 25,
                "keep_last": 1,
            },
            "seed": seed,
        }
        if pool is not None:
            stage["teacher"] = {"kind": "adapters", "pool": {"from": pool}, **({"deltas": {"from": deltas}} if deltas else {})}
        self.stages[name] = stage
        return name

    def judge(self, generators: list[str], pool: str, label: str = "", **changes: Any) -> str:
        """Judge the first generator beside the others and all controls, with fresh probes; returns the stage's name."""
        name = f"judge{label}-{generators[0]}"
        count, length = (2, 16) if self.quick else (16, 48)
        self.stages[name] = {
            "kind": "evaluate_adapters",
            "from": generators[0],
            "against": generators[1:],
            "pool": {"from": pool},
            "rows": 2 if self.quick else 8,
            # Other snippets than those of training, from test text.
            "probes": {"kind": "conditions", "conditions": {"from": "conditions"}, "count": count, "length": length, "seed": 1},
            **({"splits": ["seen", "held_out_slice"]} if self.quick else {}),
            **changes,
        }
        return name

    def run(self) -> Path:
        """Run what is not done yet; returns the run directory."""
        recipe = Recipe.model_validate({"name": "adapters_lab", "stages": copy.deepcopy(self.stages)})
        return run_recipe(recipe, recipe_dir=HERE, run_dir=self.out)

    def judged(self, stage: str) -> Tree:
        """What a judging stage found."""
        return json.loads((self.out / stage / "evaluation" / "adapters.json").read_text())


def per_condition(judged: list[Tree], split: str, column: str, kind: str = "nll") -> np.ndarray:
    """One number for each condition of a split and seed, ``[conditions, seeds]``."""
    rows = [[c for c in found["conditions"] if c["split"] == split] for found in judged]
    return np.array([[own[kind][column] for own in of_seeds] for of_seeds in zip(*rows, strict=True)])


def share(judged: list[Tree], split: str, column: str) -> list[float]:
    """Share of the teachers' gain, a seed: ratio of the mean gains."""
    base, teacher, found = (per_condition(judged, split, name) for name in ("base", "teacher", column))
    return list((base - found).mean(0) / (base - teacher).mean(0))


METRICS = ("nll", "share", "share_mean", "delta_cosine", "delta_ratio", "size_ratio")


def summary_rows(judged: list[Tree], columns: Sequence[str], seeds: Sequence[int]) -> Rows:
    """Rows of ``results.json``: every column's means by split and seed."""
    rows: Rows = []
    for split in judged[0]["splits"]:
        for column in columns:
            for seed, found in zip(seeds, judged, strict=True):
                table = found["splits"][split]
                rows += as_rows(f"{split}: {column}", seed, {m: table[m][column] for m in METRICS if column in table.get(m, {})})
    return rows


def rename(found: Tree, names: dict[str, str]) -> Tree:
    """Call a judging's columns by other names than their stages; "STAGE, shuffled" follows its stage."""

    def new(name: str) -> str:
        stage, comma, rest = name.partition(",")
        return names.get(name, names.get(stage, stage) + comma + rest)

    for table in [*found["splits"].values(), *found["conditions"]]:
        table.update({key: {new(name): number for name, number in value.items()} for key, value in table.items() if isinstance(value, dict)})
    return found


def best_rate(lab: Lab, candidates: dict[float, str]) -> float:
    """The learning rate whose run has the lowest watched cross-entropy on test text of seen conditions (a tuning run's last validation)."""
    found = {lr: json.loads((lab.out / stage / "stage.json").read_text())["result"]["held_out/ce"] for lr, stage in candidates.items()}
    return min(found, key=lambda lr: found[lr])
