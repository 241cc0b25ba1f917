"""Recipes of every kind of student: two gloo ranks give the loss trace of one over 20 steps, and a checkpoint of either goes on with the other.

Documents of unequal lengths in rows, prompts whose labels do not count, three rows a rank in micro-batches of two and one, and a last step of
an epoch that may leave a rank with fewer.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from integration.test_two_ranks_generator import RECIPE as GENERATOR
from limbeck.config.recipe import Recipe
from limbeck.engine.loop import Trainer
from limbeck.engine.metrics import loss_trace, read_metrics
from limbeck.models.loading import build_model, resolve_source, save_model
from limbeck.stages.run import run_recipe

STEPS, HALF = 20, 10
BOUNDS = {"float32": 1e-4, "float64": 1e-5}
TOKENIZER = "builtin:code-2m"
DENSE = {
    "model_type": "qwen3", "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True, "max_position_embeddings": 64, "eos_token_id": 0, "pad_token_id": 0,
    "initializer_range": 0.1,
}  # fmt: skip
SPARSE = {
    **{name: value for name, value in DENSE.items() if name != "head_dim"},
    "model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}  # fmt: skip
DATA = {"source": {"kind": "stdlib", "limit": 12}, "tokenizer": TOKENIZER, "sequence": 32, "held_out": 0.3}
LOOP = {"steps": STEPS, "batch_tokens": 6 * 32, "microbatch": 2, "log_every": 1, "checkpoint_every": STEPS}
TERNARY = [
    {"kind": "ce", "weight": 0.5},
    {"kind": "topk_kl", "k": 8, "temperature": 2.0, "weight": 0.5},
    {"kind": "moe_balance", "weight": 0.01},
    {"kind": "router_entropy", "weight": 0.001},
]
STAGES: dict[str, dict[str, Any]] = {
    "align": {
        "student": {"base": "dense", "surgery": [{"kind": "hybridize", "keep": []}], "train": ["mixers"]},
        "teacher": {"kind": "self"},
        "objectives": [{"kind": "attention_alignment"}],
        "optim": {"groups": [{"role": "mixers", "lr": 3e-3}]},
    },
    "distil": {
        "student": {"base": "dense", "surgery": [{"kind": "hybridize", "keep": [1]}]},
        "teacher": {"kind": "local", "model": "dense"},
        "objectives": [{"kind": "kl"}],
        "optim": {"groups": [{"role": "mixers", "lr": 1e-3}, {"role": "rest", "lr": 1e-4}]},
    },
    "ternary": {
        "student": {"base": "sparse", "surgery": [{"kind": "ternarize", "method": "elastic", "warmup": HALF}]},
        "teacher": {"kind": "local", "model": "sparse"},
        "objectives": TERNARY,
        "optim": {"groups": [{"role": "ternary", "kind": "muon", "lr": 0.02, "newton_schulz": "float32"}, {"kind": "lion", "lr": 1e-4}]},
    },
}
NAMES = (*STAGES, "generate")
JUDGED: dict[str, dict[str, Any]] = {
    "rank": {
        "kind": "rank_layers", "from": "align", "method": "ga_s2", "keep": 1, "rows": 6, "random_sets": 5, "precision": "float32",
        "recall": {"tasks": ["repeat"], "distances": [8], "rows": 3},
        "distil": {"optim": {"groups": [{"lr": 1e-3}], "schedule": {"kind": "constant"}}, "loop": {"steps": 4, "batch_tokens": 192, "precision": "float32"}},
    },
    "evaluate": {
        "kind": "evaluate", "from": "distil", "against": ["teacher"], "rows": 7, "precision": "float32",
        "recall": {"tasks": ["repeat"], "distances": [8, 16], "rows": 5}, "speed": {"contexts": [32], "tokens": 2}, "samples": {"tokens": 4},
    },
}  # fmt: skip
"""What is spread over ranks without being trained on them."""


def stage(name: str, precision: str) -> dict[str, Any]:
    loop = {**LOOP, "precision": precision, "activation_checkpointing": name == "distil"}
    return {"data": DATA, **STAGES[name], "loop": loop}


def recipe(name: str, precision: str) -> Recipe:
    if name != "generate":
        return Recipe.model_validate({"name": name, "stages": {name: stage(name, precision)}})
    tree: dict[str, Any] = copy.deepcopy(GENERATOR)
    del tree["stages"]["evaluate"]
    # At a rate at which the delta's loss does not reach hundreds: bounds are on the loss as it is.
    tree["stages"]["generate"]["optim"] = {"groups": [{"lr": 2e-4}]}
    tree["stages"]["generate"]["loop"] = {**LOOP, "batch_tokens": 6 * 48, "precision": precision}
    return Recipe.model_validate(tree)


def judge(folder: Path, where: str) -> None:
    """Rank and evaluate what one rank has trained."""
    stages = {name: stage(name, "float32") for name in ("align", "distil")}
    tree = Recipe.model_validate({"name": "judged", "stages": {**stages, **JUDGED}})
    run_recipe(tree, recipe_dir=folder, run_dir=folder / f"judged-{where}", say=lambda text: None, device="cpu")


@contextmanager
def told_to_stop(name: str) -> Iterator[None]:
    """Inside, a stage's training is told to stop after half of its steps, and does."""
    apply = Trainer._apply

    def watched(self: Trainer, *arguments: Any) -> None:
        apply(self, *arguments)
        if self.folder.name == name and self.at.step == HALF - 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    Trainer._apply = watched  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        Trainer._apply = apply  # type: ignore[method-assign]


def run(folder: Path, name: str, precision: str, where: str) -> None:
    """Run a recipe in a folder that holds what comes before the stage, which all numbers of ranks share."""
    run_recipe(recipe(name, precision), recipe_dir=folder, run_dir=folder / f"{name}-{precision}-{where}", say=lambda text: None, device="cpu")


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=300))
    try:
        for name in NAMES:
            run(folder, name, "float32", "two")
            run(folder, name, "float64", "one-two")
            with told_to_stop(name):
                run(folder, name, "float64", "two-one")
        judge(folder, "two")
        (folder / f"done-{rank}").touch()
        dist.barrier()
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        raise
    os._exit(0)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, config in (("dense", DENSE), ("sparse", SPARSE)):
        save_model(build_model(config, seed=1), folder / name, tokenizer_source=resolve_source(TOKENIZER))
    copies = [("float32", "two"), ("float64", "one"), ("float64", "one-two"), ("float64", "two-one")]
    for name in NAMES:
        run(folder, name, "float32", "one")
        for precision, where in copies:
            shutil.copytree(folder / f"{name}-float32-one", folder / f"{name}-{precision}-{where}", ignore=shutil.ignore_patterns(name))
        run(folder, name, "float64", "one")
        with told_to_stop(name):
            run(folder, name, "float64", "one-two")
    for where in ("one", "two"):
        for name in ("align", "distil"):
            shutil.copytree(folder / f"{name}-float32-one" / name, folder / f"judged-{where}" / name)
    judge(folder, "one")
    try:
        mp.spawn(worker, (folder,), nprocs=2)
    except Exception:
        pytest.fail("\n".join(p.read_text() for p in sorted(folder.glob("error-*.txt"))))
    for name in NAMES:
        run(folder, name, "float64", "two-one")
    torch.set_num_threads(before)
    return folder


def trace(folder: Path, name: str, precision: str, where: str) -> list[float]:
    return loss_trace(folder / f"{name}-{precision}-{where}" / name / "metrics.jsonl")


def apart(name: str, precision: str, one: list[float], other: list[float]) -> float:
    assert len(one) == len(other) == STEPS
    assert max(one) - min(one) > 10 * BOUNDS[precision], "a loss that does not move shows nothing"
    most = max(abs(a - b) for a, b in zip(one, other, strict=True))
    print(f"{name}, {precision}: at most {most:.1e} apart in a loss of {one[0]:.3f} to {one[-1]:.3f}")
    return most


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_have_the_loss_trace_of_one(ran: Path, name: str) -> None:
    one, two = (trace(ran, name, "float32", where) for where in ("one", "two"))
    assert apart(name, "float32", one, two) <= BOUNDS["float32"]


def test_what_is_measured_of_a_step_is_of_all_ranks(ran: Path) -> None:
    one, two = (read_metrics(ran / f"ternary-float64-{where}" / "ternary" / "metrics.jsonl") for where in ("one", "one-two"))
    for name in ("grad_norm", "kl", "moe_balance/raw", "router_entropy/raw", "ternary/flips", "ternary/zeros", "ternary/lambda"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-5, abs=1e-9), name
    assert max(row["ternary/flips"] for row in one) > 0 and one[-1]["ternary/lambda"] == 1


@pytest.mark.parametrize("where", ["one-two", "two-one"])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_one_number_of_ranks_goes_on_with_another(ran: Path, name: str, where: str) -> None:
    """In float64; the first half of the steps of the one, and the second half of the other, are those of two ranks."""
    said = (ran / f"{name}-float64-{where}" / name / "training.log").read_text()
    assert f"resumed at step {HALF} from step_{HALF}" in said and "random streams are new" in said
    one, other = trace(ran, name, "float64", "one"), trace(ran, name, "float64", where)
    assert apart(name, "float64", one, other) <= BOUNDS["float64"]


def test_two_ranks_rank_and_judge_as_one_does(ran: Path) -> None:
    one, two = (json.loads((ran / f"judged-{where}" / "rank" / "ranking" / "ranking.json").read_text()) for where in ("one", "two"))
    # Candidates that ran beside each other, each to its end, count as far as they would have run one after the other.
    assert one == two
    assert len(list((ran / "judged-two" / "rank" / "ranking").glob("ledger-*.jsonl"))) == 3
    one, two = (json.loads((ran / f"judged-{where}" / "evaluate" / "evaluation" / "evaluation.json").read_text()) for where in ("one", "two"))
    for measure in ("perplexity", "divergence"):
        for model, numbers in one[measure].items():
            assert two[measure][model] == pytest.approx(numbers, rel=1e-5, abs=1e-5), (measure, model)
    for model, entries in one["recall"].items():
        assert [entry["count"] for entry in two["recall"][model]] == [entry["count"] for entry in entries]
        assert [entry["ce"] for entry in two["recall"][model]] == pytest.approx([entry["ce"] for entry in entries], rel=1e-5)
    assert two["samples"] == one["samples"] and len(two["speed"]) == len(one["speed"])
