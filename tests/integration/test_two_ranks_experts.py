"""Optimisers by group, routers' objectives and attention relations: two gloo ranks give what one rank gives.  One spawn for all."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from engine_parts import Loader, Rows
from families import tiny_model
from limbeck.config.parts.objectives import OBJECTIVES
from limbeck.config.parts.stages import GroupOptions, LoopOptions, OptimOptions
from limbeck.config.parts.teachers import LocalTeacherOptions
from limbeck.engine.loop import Trainer
from limbeck.engine.metrics import loss_trace, read_metrics
from limbeck.engine.optim import build_optimizer
from limbeck.engine.parallel import World, connect
from limbeck.engine.step import TrainStep
from limbeck.needs import merge_needs
from limbeck.students.student import Student
from limbeck.teachers.local import LocalTeacher
from moe_cases import moe_student, objective
from ranks import on_two_ranks

SHAPES = {
    "experts.gate_up_proj": (5, 12, 6), "experts.down_proj": (5, 6, 8), "one.down_proj": (1, 6, 8), "q.weight": (9, 6), "k.weight": (9, 6),
    "mlp.gate_up_proj.weight": (10, 6), "o.weight": (4, 12), "small.weight": (6, 4), "norm.weight": (7,), "single.weight": (1, 5),
}  # fmt: skip
"""Uneven over two ranks, of which one has nothing of some."""
GROUPS = {
    "muon": [{"match": "norm.weight", "kind": "lion", "lr": 0.01}, {"match": "single.weight", "lr": 0.01}, {"kind": "muon", "lr": 0.1, "weight_decay": 0.2}],
    "lion": [{"kind": "lion", "lr": 0.02, "weight_decay": 0.2, "decay_vectors": True}],
    "adamw": [{"kind": "adamw", "lr": 0.02, "weight_decay": 0.2}],
}


def random(name: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator)


def stepped(kind: str, mesh: DeviceMesh | None, *, products: str = "float32", steps: int = 4) -> dict[str, Tensor]:
    """Parameters after a few steps of known gradients, whole or cut between the ranks along their first dimension."""

    def placed(x: Tensor) -> Tensor:
        return x if mesh is None else distribute_tensor(x, mesh, [Shard(0)])

    parameters = {name: nn.Parameter(placed(random(name, 0))) for name in SHAPES}
    claimed = []
    for settings in GROUPS[kind]:
        more = {"newton_schulz": products} if settings.get("kind") == "muon" else {}
        options = GroupOptions.model_validate({**settings, **more})
        taken = {name for _, members in claimed for name, _ in members}
        claimed.append((options, [(n, p) for n, p in parameters.items() if n not in taken and fnmatchcase(n, options.match or "*")]))
    optimizer = build_optimizer(claimed, OptimOptions(groups=tuple(g for g, _ in claimed)))
    for step in range(1, steps + 1):
        for name, p in parameters.items():
            p.grad = placed(random(name, step))
        optimizer.step()
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in parameters.items()}


def wrong(way: str) -> tuple[Tensor, Tensor]:
    """A first update of experts flattened to one matrix, or of a matrix by its shards; and the right one."""
    from limbeck.ops.newton_schulz import orthogonalised

    x = random("experts.down_proj" if way == "flat" else "q.weight", 1)
    if way == "flat":
        return orthogonalised(x.flatten(0, 1), dtype=torch.float32).view_as(x), orthogonalised(x, dtype=torch.float32)
    return torch.cat([orthogonalised(part, dtype=torch.float32) for part in x.split([5, 4])]), orthogonalised(x, dtype=torch.float32)


MIXED = [
    {"match": "*.mlp.gate.weight", "kind": "lion", "lr": 1e-4},
    {"match": "*.mlp.experts.*", "kind": "muon", "lr": 0.02, "newton_schulz": "float32"},
    {"match": "*proj.weight", "kind": "muon", "lr": 3e-3, "scaling": "moonlight", "newton_schulz": "float32"},
    {"lr": 1e-3},
]


def trainer_of(folder: Path, kind: str, world: World, **loop: Any) -> Trainer:
    """A mixture of experts with everything on its routers, or a dense student with attention relations."""
    if kind == "experts":
        names = {"ce": 1.0, "moe_balance": 0.3, "router_entropy": 0.1, "router_z": 0.01}
        student = moe_student()
        step = TrainStep(student, [objective(name, weight=weight) for name, weight in names.items()])
    else:
        options = OBJECTIVES.options("attention_relation").model_validate({"kind": "attention_relation", "heads": 4, "layer": -2, "ratio": 0.3})
        teacher = LocalTeacher(LocalTeacherOptions(model="x"), "x")
        teacher.module = tiny_model("llama3", seed=1, dtype=torch.float64)
        student = Student(tiny_model("llama3", dtype=torch.float64))
        step = TrainStep(student, [objective("ce"), OBJECTIVES.build(options)], teacher, merge_needs(options.needs()))
    groups: list[tuple[GroupOptions, list[tuple[str, nn.Parameter]]]] = [(GroupOptions.model_validate(g), []) for g in MIXED]
    for name, p in step.student.named_parameters():
        next(members for options, members in groups if fnmatchcase(name, options.match or "*")).append((name, p))
    groups = [(options, members) for options, members in groups if members]
    return Trainer(
        step, Loader(Rows(21), 10, rank=world.rank, world=world.size), groups=groups, folder=folder, world=world,
        optim_options=OptimOptions(groups=tuple(g for g, _ in groups)),
        loop=LoopOptions(**{"precision": "float64", "steps": 8, "log_every": 1, "checkpoint_every": 3, **loop}),
    )  # fmt: skip


def check(folder: Path, rank: int, mesh: DeviceMesh) -> None:
    for kind in GROUPS:
        found, expected = stepped(kind, mesh), stepped(kind, None)
        for name, value in expected.items():
            assert (found[name] - value).abs().max() <= 1e-5, f"{kind}: {name} moved by {(found[name] - value).abs().max()}"
    found, expected = stepped("muon", mesh, products="bfloat16"), stepped("muon", None, products="bfloat16")
    assert all((found[name] - value).abs().max() <= 0.02 for name, value in expected.items())
    world = connect("cpu", timeout=120)
    for kind in ("experts", "relations"):
        trainer_of(folder / kind, kind, world, microbatch=2).run()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    on_two_ranks(partial(check, folder), folder)
    return folder


@pytest.mark.parametrize("kind", ["experts", "relations"])
def test_two_ranks_have_the_trace_of_one(two: Path, tmp_path: Path, kind: str) -> None:
    trainer_of(tmp_path / kind, kind, World(torch.device("cpu"))).run()
    mine, theirs = (loss_trace(folder / kind / "metrics.jsonl") for folder in (tmp_path, two))
    assert len(mine) == len(theirs) == 8
    assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) <= 1e-8
    ours, others = (read_metrics(folder / kind / "metrics.jsonl")[-1] for folder in (tmp_path, two))
    watched = ("router/cv", "router/peak/2", "moe_balance/raw") if kind == "experts" else ("attention_relation/ratio", "attention_relation/weight")
    for name in watched:
        assert ours[name] == pytest.approx(others[name], rel=1e-7) and ours[name] > 0


def test_a_checkpoint_of_two_ranks_goes_on_as_one(two: Path, tmp_path: Path) -> None:
    """Momenta are put together from both, and the load is there."""
    import shutil

    folder = tmp_path / "experts"
    shutil.copytree(two / "experts", folder)
    shutil.rmtree(folder / "checkpoints" / "final")
    trainer_of(folder, "experts", World(torch.device("cpu"))).run()
    again, before = (loss_trace(f / "experts" / "metrics.jsonl") for f in (tmp_path, two))
    assert len(again) == 8
    assert max(abs(a - b) for a, b in zip(again, before, strict=True)) <= 1e-8


@pytest.mark.parametrize(("way", "most"), [("flat", 0.97), ("shards", 0.97)])
def test_the_ways_that_are_wrong_would_be_seen(way: str, most: float) -> None:
    found, right = wrong(way)
    assert torch.cosine_similarity(found.flatten(), right.flatten(), dim=0) < most
    assert (found - right).abs().max() > 1e-2
