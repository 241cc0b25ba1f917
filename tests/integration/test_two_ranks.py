"""Two gloo ranks give what one rank gives.  One spawn serves many assertions: starting processes is most of the cost."""

from __future__ import annotations

import json
import os
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from engine_parts import DenseCE, DenseKL, Loader, Rows, Student, Teacher, make_step, make_trainer
from limbeck.engine.metrics import loss_trace, read_metrics
from limbeck.engine.parallel import World, assert_sharded, connect, full_state_dict
from limbeck.engine.step import TrainStep
from limbeck.errors import RunError
from limbeck.needs import HeadHidden

DTYPES = {"float32": torch.float32, "float64": torch.float64}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "ce-float32": ("ce", {}),
    "ce-float64": ("ce", {"precision": "float64", "microbatch": 3}),
    "kl-float32": ("kl", {"microbatch": 2, "activation_checkpointing": True}),
    "kl-float64": ("kl", {"precision": "float64"}),
    "stream-float32": ("stream", {"microbatch": 3}),
    "stream-float64": ("stream", {"precision": "float64"}),
}
SHORT = 21
"""Rows of the data: with 10 a step, the last step of an epoch has one row, and one of two ranks has none."""


def train(folder: Path, name: str, world: World) -> Any:
    kind, loop = RUNS[name]
    trainer = make_trainer(
        folder / name,
        make_step(kind, dtype=DTYPES[name.partition("-")[2]]),
        rows=Rows(SHORT),
        world=world,
        lr=3e-3,
        validation_rows=Rows(5, seed=9),
        validate_every=10,
        **loop,
    )
    trainer.run()
    return trainer


def head_only_gradients(world: World) -> dict[str, torch.Tensor]:
    """Gradients of one step in which nothing below the tied head trains but the embedding it is tied to."""
    student = Student(dtype=torch.float64)
    student.requires_grad_(False)
    student.embedding.weight.requires_grad_(True)
    step = TrainStep(student, [DenseCE(), DenseKL()], Teacher(seed=1, dtype=torch.float64), {HeadHidden: HeadHidden()})
    # The embedding's own lookup is cut off: only the head's use of the weight is left in the graph.
    student.embedding.register_forward_hook(lambda m, args, out: out.detach())
    trainer = make_trainer(Path("unused"), step, rows=Rows(SHORT), world=world, precision="float64")
    batch = Loader(Rows(SHORT), 10, rank=world.rank, world=world.size).next_step()
    counts = world.sum(step.counts(batch)).tolist()
    step.run(*step.answer(batch), [w / c for w, c in zip(step.weights(0), counts, strict=True)])
    grads = {name: p.grad for p, name in trainer.names.items()}
    if world.size > 1:
        assert all(isinstance(g, DTensor) for g in grads.values())
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}  # type: ignore[union-attr,misc]


def worker(rank: int, folder: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=300))
    try:
        world = connect("cpu", timeout=300)
        report: dict[str, Any] = {}
        for name in RUNS:
            trainer = train(folder, name, world)
            weights = full_state_dict(trainer.train_step.student)
            report[f"local {name}"] = sum(p.to_local().numel() for p in trainer.train_step.student.parameters())
            if rank == 0:
                torch.save(weights, folder / f"{name}.pt")
        torch.save(head_only_gradients(world), folder / f"head-{rank}.pt")
        # A run that one rank is told to stop is stopped on both, and continues from its checkpoint.
        trainer = make_trainer(
            folder / "stopped", make_step(dtype=torch.float64), rows=Rows(SHORT), world=world, precision="float64", lr=3e-3
        )
        tell = trainer._apply

        def update(*args: Any) -> None:
            tell(*args)
            if rank == 1 and trainer.at.step == 6:
                os.kill(os.getpid(), 10)

        trainer._apply = update  # type: ignore[method-assign]
        report["stopped"] = trainer.run().exit_reason
        make_trainer(
            folder / "stopped", make_step(dtype=torch.float64), rows=Rows(SHORT), world=world, precision="float64", lr=3e-3
        ).run()
        try:
            assert_sharded(Student(), world)
        except RunError as error:
            report["unsharded"] = str(error)
        (folder / f"report-{rank}.json").write_text(json.dumps(report))
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    try:
        mp.spawn(worker, (folder,), nprocs=2)
    except Exception:
        pytest.fail("\n".join(p.read_text() for p in sorted(folder.glob("error-*.txt"))))
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    for name in RUNS:
        trainer = train(folder, name, World(torch.device("cpu")))
        torch.save(full_state_dict(trainer.train_step.student), folder / f"{name}.pt")
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_have_the_loss_trace_of_one(one: Path, two: Path, name: str) -> None:
    bound = 1e-4 if "32" in name else 1e-5
    mine, theirs = (loss_trace(folder / name / "metrics.jsonl") for folder in (one, two))
    assert len(mine) == len(theirs) == 20
    assert mine[-1] < mine[0]
    assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) <= bound
    # Adam and clipping hide a gradient that is too large by a factor.
    norms = [
        [row["grad_norm"] for row in read_metrics(folder / name / "metrics.jsonl") if "grad_norm" in row] for folder in (one, two)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_end_with_the_weights_of_one(one: Path, two: Path, name: str) -> None:
    mine, theirs = (torch.load(folder / f"{name}.pt", weights_only=True) for folder in (one, two))
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        torch.testing.assert_close(theirs[key], value, atol=1e-3 if "32" in name else 1e-8, rtol=0)


def test_two_ranks_validate_to_the_same_number(one: Path, two: Path) -> None:
    def validation(folder: Path) -> list[float]:
        rows = [json.loads(line) for line in (folder / "kl-float64" / "metrics.jsonl").read_text().splitlines()]
        return [row["validation/loss"] for row in rows if "validation/loss" in row]

    assert len(validation(one)) == 2
    assert validation(two) == pytest.approx(validation(one), abs=1e-9)


def test_every_rank_holds_its_share_and_an_unsharded_network_is_refused(two: Path) -> None:
    reports = [json.loads((two / f"report-{rank}.json").read_text()) for rank in (0, 1)]
    whole = sum(p.numel() for p in Student().parameters())
    for name in RUNS:
        shares = [report[f"local {name}"] for report in reports]
        assert sum(shares) == whole
        assert max(shares) < 0.6 * whole
    assert all("is not sharded" in report["unsharded"] for report in reports)


def test_a_head_that_trains_alone_has_the_gradient_of_one_rank(two: Path) -> None:
    expected = head_only_gradients(World(torch.device("cpu")))
    for rank in (0, 1):
        found = torch.load(two / f"head-{rank}.pt", weights_only=True)
        for name, grad in expected.items():
            assert grad.norm() > 0
            assert (found[name] - grad).norm() <= 1e-12 * grad.norm()


def test_a_signal_to_one_rank_stops_both_and_the_run_goes_on(one: Path, two: Path) -> None:
    reports = [json.loads((two / f"report-{rank}.json").read_text()) for rank in (0, 1)]
    assert [report["stopped"] for report in reports] == ["preempted", "preempted"]
    assert (two / "stopped" / "exit_reason").read_text().strip() == "finished"
    trace = loss_trace(two / "stopped" / "metrics.jsonl")
    assert trace == pytest.approx(loss_trace(one / "ce-float64" / "metrics.jsonl"), abs=1e-9)


def test_a_checkpoint_of_two_ranks_is_read_by_one(two: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "resharded"
    shutil.copytree(two / "ce-float64", folder)
    said: list[str] = []
    trainer = make_trainer(
        folder, make_step(dtype=torch.float64), rows=Rows(SHORT), precision="float64", microbatch=3, lr=3e-3, steps=21
    )
    trainer.voice.say = said.append  # type: ignore[method-assign]
    trainer.run()
    assert any("1 ranks instead of 2" in line for line in said)
    for key, value in torch.load(two / "ce-float64.pt", weights_only=True).items():
        # One more step at a rate near zero: the weights are those of the checkpoint.
        torch.testing.assert_close(trainer.train_step.student.state_dict()[key], value, atol=1e-2, rtol=0)
