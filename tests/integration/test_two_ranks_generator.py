"""A LoRA generator on two gloo ranks trains as on one: the frozen base sharded, the generator in its own precision."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.device_mesh import DeviceMesh

from engine_parts import Rows, make_step
from limbeck.adapters.delta_store import MeasuredDeltas
from limbeck.adapters.pool import read_pool
from limbeck.engine.metrics import loss_trace
from limbeck.engine.parallel import World, parallelize
from limbeck.engine.precision import sharded_policy
from limbeck.types import Signal
from ranks import on_two_ranks

RECIPE = {
    "name": "two",
    "stages": {
        "conditions": {
            "kind": "prepare_conditions",
            "tokenizer": "builtin:code-2m",
            "sources": [{"name": "stdlib", "source": {"kind": "stdlib", "limit": 60}, "cut": 300, "slices": {"by": "topic", "count": 3}}],
            "formats": ["plain", "upper"],
            "examples": 16,
            "test_examples": 4,
            "min_examples": 4,
            "sequence": 48,
            "condition": {"texts": 2, "tokens": 12},
        },
        "pool": {
            "kind": "train_adapters",
            "base": "builtin:code-2m",
            "conditions": {"from": "conditions"},
            "adapters": {"targets": "attention", "rank": 2, "alpha": 4},
            "optim": {"groups": [{"lr": 1e-2}], "clip": None},
            "loop": {"steps": 3, "rows": 1, "precision": "float32", "log_every": 1},
        },
        "deltas": {"kind": "measure_deltas", "pool": {"from": "pool"}, "probes": {"count": 2, "length": 8}, "together": 2},
        "generate": {
            "data": {"from": "conditions"},
            "student": {
                "base": "builtin:code-2m",
                "surgery": [{"kind": "lora_generator", "targets": "attention", "rank": 2, "alpha": 4, "width": 32}],
                "train": ["generator"],
            },
            "teacher": {"kind": "adapters", "pool": {"from": "pool"}, "deltas": {"from": "deltas"}},
            "objectives": [
                {"kind": "ce"},
                {"kind": "norm_penalty", "weight": 0.01},
                {"kind": "weights", "loss": "product", "weight": 0.1},
                {"kind": "delta", "microbatch": 1},
                {"kind": "tether", "weight": 0.1, "microbatch": 1},
            ],
            "optim": {"groups": [{"lr": 3e-3}]},
            "loop": {
                "steps": 5, "batch_tokens": 192, "microbatch": 2, "precision": "float32", "log_every": 1, "validate_every": 5, "validate_rows": 3,
            },
        },
        "evaluate": {"kind": "evaluate_adapters", "from": "generate", "pool": {"from": "pool"}, "probes": None, "rows": 1, "draws": 1, "bootstrap": 100},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "two.yaml").write_text(yaml.safe_dump(RECIPE))
    made = {}
    for ranks in (1, 2):
        made[ranks] = folder / f"run{ranks}"
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "limbeck"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        # Three rows to validate on: the second rank has one fewer than the first.
        done = subprocess.run(
            [*start, "run", "two.yaml", "--run-dir", str(made[ranks])], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return made


def test_two_ranks_have_the_loss_trace_of_one(runs: dict[int, Path]) -> None:
    one, two = (loss_trace(runs[ranks] / "generate" / "metrics.jsonl") for ranks in (1, 2))
    assert len(one) == 5 and max(one) - min(one) > 0.05
    assert two == pytest.approx(one, rel=1e-5)


def test_two_ranks_validate_to_the_same_number_and_save_the_same_generator(runs: dict[int, Path]) -> None:
    from safetensors.torch import load_file

    results = [json.loads((runs[ranks] / "generate" / "stage.json").read_text())["result"] for ranks in (1, 2)]
    for name in ("ce", "delta_cosine", "tether"):
        assert results[1][f"held_out/{name}"] == pytest.approx(results[0][f"held_out/{name}"], rel=1e-4 if name == "tether" else 1e-5), name
    one, two = (load_file(runs[ranks] / "generate" / "model" / "generator.safetensors") for ranks in (1, 2))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        # As a whole: where a gradient is next to nothing, Adam makes much of the order in which it was summed.
        assert (tensor - two[name]).norm() <= 1e-3 * tensor.norm() + 1e-6, name


def _gathered_dtypes(rank: int, mesh: DeviceMesh) -> None:
    step = make_step()
    kept, cast = step.student.units()[:2]
    kept.keeps_precision = True
    found: dict[str, set[torch.dtype]] = {"kept": set(), "cast": set()}
    for name, unit in (("kept", kept), ("cast", cast)):
        inner = next(module for module in unit.modules() if isinstance(module, torch.nn.Linear))
        inner.register_forward_pre_hook(lambda module, args, name=name: found[name].add(module.weight.dtype))
    world = World(torch.device("cpu"), rank, 2, mesh, torch.distributed.group.WORLD)
    parallelize(step, world, sharded_policy("bfloat16"))
    with torch.autocast("cpu", torch.bfloat16):
        step(Rows(4).batch(range(4)), Signal(), [1.0])
    assert found == {"kept": {torch.float32}, "cast": {torch.bfloat16}}


def test_a_unit_that_keeps_its_precision_is_gathered_in_it(tmp_path: Path) -> None:
    on_two_ranks(_gathered_dtypes, tmp_path)


def test_two_ranks_train_and_measure_the_same_adapters_and_judge_alike(runs: dict[int, Path]) -> None:
    one, two = (read_pool(runs[ranks] / "pool" / "adapters") for ranks in (1, 2))
    assert [entry.name for entry in one.entries] == [entry.name for entry in two.entries] and len(one.entries) == 6
    for a, b in zip(one.adapters().tensors(), two.adapters().tensors(), strict=True):
        assert (a - b).norm() <= 1e-3 * a.norm() and a.norm() > 0
    names = [entry.name for entry in one.entries]
    measured = [MeasuredDeltas(runs[ranks] / "deltas" / "deltas").stacked(names) for ranks in (1, 2)]
    assert (measured[0] - measured[1]).norm() <= 1e-3 * measured[0].norm()
    tables = [json.loads((runs[ranks] / "evaluate" / "evaluation" / "adapters.json").read_text())["splits"]["seen"]["nll"] for ranks in (1, 2)]
    assert tables[0].keys() == tables[1].keys() and tables[1] == pytest.approx(tables[0], rel=1e-4)
