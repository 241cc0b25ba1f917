"""A ternary student under its teacher, by Muon and Lion: two gloo ranks with documents of unequal lengths give what one gives."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from engine_parts import Loader, Rows
from limbeck.config.parts.objectives import OBJECTIVES
from limbeck.config.parts.stages import GroupOptions, LoopOptions, OptimOptions
from limbeck.config.parts.surgeries import TernarizeOptions
from limbeck.config.parts.teachers import LocalTeacherOptions
from limbeck.engine.loop import Trainer
from limbeck.engine.metrics import loss_trace, read_metrics
from limbeck.engine.parallel import World, connect
from limbeck.engine.step import TrainStep
from limbeck.models.limbeck_model import wrap_student
from limbeck.needs import merge_needs
from limbeck.students.student import Student
from limbeck.teachers.local import LocalTeacher
from moe_cases import moe_student
from ranks import on_two_ranks

STEPS, ROWS, A_STEP = 20, 21, 10
"""Every third step has one row, and the other rank has none."""
TERMS: dict[str, dict[str, Any]] = {
    "ce": {"weight": 0.5}, "topk_kl": {"k": 8, "temperature": 2.0, "weight": 0.5}, "moe_balance": {"weight": 0.01},
    "router_entropy": {"weight": 0.001},
}  # fmt: skip
GROUPS = [{"match": "*.mlp.experts.*_proj", "kind": "muon", "lr": 0.02, "newton_schulz": "float32"}, {"kind": "lion", "lr": 1e-4}]


def trainer_of(folder: Path, world: World) -> Trainer:
    """The seed's loss and optimisers on a tiny mixture of experts with learnt scales, while lambda rises."""
    # fp64, or a code at a boundary would go to the other side in the last digit of a sum over ranks.
    options = TernarizeOptions(method="elastic", warmup=STEPS // 2)
    student = Student(wrap_student(moe_student(seed=1).model, [options], {"source": "tiny", "fingerprint": {}}))
    teacher = LocalTeacher(LocalTeacherOptions(model="x"), "x")
    teacher.module = moe_student(seed=1).model
    terms = [OBJECTIVES.options(kind).model_validate({"kind": kind, **settings}) for kind, settings in TERMS.items()]
    needs = merge_needs(need for term in terms for need in term.needs())
    step = TrainStep(student, [OBJECTIVES.build(term) for term in terms], teacher, needs)
    groups: list[tuple[GroupOptions, list[tuple[str, nn.Parameter]]]] = [(GroupOptions.model_validate(g), []) for g in GROUPS]
    for name, p in student.named_parameters():
        next(members for group, members in groups if fnmatchcase(name, group.match or "*")).append((name, p))
    return Trainer(
        step, Loader(Rows(ROWS), A_STEP, rank=world.rank, world=world.size), groups=groups, folder=folder, world=world,
        optim_options=OptimOptions(groups=tuple(group for group, _ in groups)),
        loop=LoopOptions(precision="float64", steps=STEPS, log_every=1, microbatch=2),
    )  # fmt: skip


def check(folder: Path, rank: int, mesh: DeviceMesh) -> None:
    trainer_of(folder / "two", connect("cpu", timeout=120)).run()


def test_two_ranks_have_the_trace_of_one_over_twenty_steps(tmp_path: Path) -> None:
    on_two_ranks(partial(check, tmp_path), tmp_path)
    trainer_of(tmp_path / "one", World(torch.device("cpu"))).run()
    mine, theirs = (loss_trace(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(mine) == len(theirs) == STEPS
    assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) <= 1e-5
    ours, others = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for name in ("grad_norm", "kl", "moe_balance/raw", "router_entropy/raw", "ternary/flips", "ternary/zeros", "ternary/lambda"):
        values: list[list[Any]] = [[row[name] for row in rows] for rows in (ours, others)]
        assert values[0] == pytest.approx(values[1], rel=1e-5, abs=1e-9), name
    assert max(row["ternary/flips"] for row in ours) > 0 and ours[-1]["ternary/lambda"] == 1
