"""The loop: what a gradient may not depend on, budgets, gates, failures and stops."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_parts import DenseCE, Loader, Rows, Student, Teacher, make_step, make_trainer
from limbeck.config.parts.objectives import Ramp
from limbeck.config.parts.stages import GroupOptions, LoopOptions, OptimOptions
from limbeck.engine.batches import num_steps
from limbeck.engine.loop import Trainer
from limbeck.engine.metrics import loss_trace, read_metrics
from limbeck.engine.step import TrainStep
from limbeck.errors import RunError
from limbeck.types import LossTerm


def gradients(folder: Path, kind: str, dtype: torch.dtype, **loop: Any) -> dict[str, Tensor]:
    """Gradients of the first step, as the loop makes them."""
    found: dict[str, Tensor] = {}
    trainer = make_trainer(folder, make_step(kind, dtype=dtype), steps=1, precision=str(dtype)[6:], optim={"clip": None}, **loop)
    step = trainer.optimizer.step

    def spy(*args: Any, **kwargs: Any) -> Any:
        found.update({name: p.grad.clone() for p, name in trainer.names.items() if p.grad is not None})
        return step(*args, **kwargs)

    trainer.optimizer.step = spy  # type: ignore[method-assign]
    trainer.run()
    return found


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    flat = [torch.cat([g[name].flatten() for name in sorted(g)]) for g in (a, b)]
    return float((flat[0] - flat[1]).norm() / flat[0].norm())


@pytest.mark.parametrize("kind", ["ce", "kl", "stream"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_micro_batching_does_not_change_the_gradient(tmp_path: Path, kind: str, dtype: torch.dtype, bound: float) -> None:
    whole = gradients(tmp_path / "whole", kind, dtype)
    for rows in (1, 3):
        assert distance(whole, gradients(tmp_path / str(rows), kind, dtype, microbatch=rows)) <= bound


def test_activation_checkpointing_does_not_change_the_gradient(tmp_path: Path) -> None:
    plain = gradients(tmp_path / "plain", "kl", torch.float64)
    assert distance(plain, gradients(tmp_path / "recomputed", "kl", torch.float64, activation_checkpointing=True)) <= 1e-12


def test_bfloat16_keeps_float32_weights_and_trains(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, precision="bfloat16", lr=3e-2)
    trainer.run()
    assert {p.dtype for p in trainer.parameters} == {torch.float32}
    trace = loss_trace(tmp_path / "metrics.jsonl")
    assert trace[-1] < 0.8 * trace[0]


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 1000}, 5),
        ({"samples": 61}, 7),
        ({"epochs": 1}, 7),
        ({"epochs": 2.0}, 14),
        ({"epochs": 0.1}, 1),
    ],
)
def test_every_budget_comes_to_steps(budget: dict[str, Any], steps: int) -> None:
    assert num_steps(LoopOptions(**budget), Loader(Rows(64), 10)) == steps


class Drawing(DenseCE):
    """Cross-entropy that draws random numbers, and remembers whether the student was training when it was not."""

    def __init__(self, student: Student):
        super().__init__()
        self.student, self.modes = student, set[tuple[bool, bool]]()

    def __call__(self, *args: Any) -> LossTerm:
        torch.rand(3)
        self.modes.add((torch.is_grad_enabled(), self.student.training))
        return super().__call__(*args)


def test_validation_does_not_move_the_training(tmp_path: Path) -> None:
    def train(name: str, **options: Any) -> Drawing:
        student = Student(dropout=0.2)
        objective = Drawing(student)
        make_trainer(tmp_path / name, TrainStep(student, [objective]), **options).run()
        return objective

    train("without")
    objective = train("with", validation_rows=Rows(seed=5), validate_every=3)
    assert objective.modes == {(True, True), (False, False)}
    assert loss_trace(tmp_path / "with" / "metrics.jsonl") == loss_trace(tmp_path / "without" / "metrics.jsonl")
    rows = [row for row in read_metrics(tmp_path / "with" / "metrics.jsonl") if "validation/loss" in row]
    assert [row["step"] for row in rows] == [3, 6, 9, 12, 15, 18, 20]
    assert rows[-1]["validation/ce"] < rows[0]["validation/ce"]


def test_a_logged_line_has_what_a_report_needs(tmp_path: Path) -> None:
    make_trainer(tmp_path, make_step("kl"), log_every=10, checkpoint_every=20, steps=25).run()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 10, 20, 25]
    assert sum(len(row["losses"]) for row in rows) == 25
    wanted = {
        "tokens",
        "loss",
        "ce/raw",
        "ce/weighted",
        "kl/raw",
        "kl",
        "accuracy",
        "grad_norm",
        "lr/0",
        "tokens_per_second",
        "memory_bytes",
    }
    assert wanted | {"teacher_seconds", "eta_seconds", "time"} <= rows[0].keys()
    assert rows[0]["loss"] == pytest.approx(rows[0]["ce/weighted"] + rows[0]["kl/weighted"], rel=1e-6)
    assert rows[0]["ce/weighted"] == pytest.approx(0.5 * rows[0]["ce/raw"], rel=1e-6)


class Poisoned(DenseCE):
    """Cross-entropy that is not finite at chosen calls."""

    def __init__(self, when: Callable[[int], bool]):
        super().__init__()
        self.when, self.calls = when, 0

    def __call__(self, *args: Any) -> LossTerm:
        term = super().__call__(*args)
        self.calls += 1
        return LossTerm(term.sum * float("nan"), term.metrics) if self.when(self.calls) else term


def test_a_nan_stops_the_run_and_names_the_tensor(tmp_path: Path) -> None:
    step = TrainStep(Student(), [Poisoned(lambda call: call == 8)])
    with pytest.raises(RunError, match=r"step 8: the gradient is not finite.*embedding\.weight"):
        make_trainer(tmp_path, step, checkpoint_every=2).run()
    assert (tmp_path / "exit_reason").read_text() == "failed\n"
    assert (tmp_path / "checkpoints" / "step_6").exists()


def test_skipping_non_finite_steps_is_bounded(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "few", TrainStep(Student(), [Poisoned(lambda call: 5 <= call < 8)]), on_nonfinite="skip")
    assert trainer.run().steps == 20
    assert all(bool(torch.isfinite(p).all()) for p in trainer.parameters)
    with pytest.raises(RunError, match="the 10 steps before it"):
        make_trainer(tmp_path / "many", TrainStep(Student(), [Poisoned(lambda call: call > 3)]), on_nonfinite="skip").run()


def test_gates_stop_what_does_not_learn(tmp_path: Path) -> None:
    assert make_trainer(tmp_path / "learns", stop_unless={"loss": "decreases", "below": 6.0}, lr=3e-2).run().loss < 6
    with pytest.raises(RunError, match=r"stop_unless\.below: the loss must end below 0\.1"):
        make_trainer(tmp_path / "short", stop_unless={"below": 0.1}).run()
    with pytest.raises(RunError, match=r"stop_unless\.loss: the loss must decrease"):
        make_trainer(tmp_path / "still", stop_unless={"loss": "decreases"}, lr=1e-12, rows=Rows(10)).run()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_the_run_goes_on(tmp_path: Path, number: int) -> None:
    make_trainer(tmp_path / "whole", make_step(dropout=0.1)).run()
    trainer = make_trainer(tmp_path / "stopped", make_step(dropout=0.1))
    update = trainer._apply

    def interrupted(*args: Any) -> None:
        update(*args)
        if trainer.at.step == 4:
            os.kill(os.getpid(), number)

    trainer._apply = interrupted  # type: ignore[method-assign]
    before = signal.getsignal(number)
    result = trainer.run()
    assert (result.exit_reason, result.steps) == ("preempted", 5)
    assert signal.getsignal(number) is before
    assert (tmp_path / "stopped" / "exit_reason").read_text() == "preempted\n"
    torch.manual_seed(99)  # another process would not find the random stream where this one left it
    assert make_trainer(tmp_path / "stopped", make_step(dropout=0.1)).run().exit_reason == "finished"
    assert loss_trace(tmp_path / "stopped" / "metrics.jsonl") == loss_trace(tmp_path / "whole" / "metrics.jsonl")


def test_groups_must_be_exactly_what_trains() -> None:
    step = make_step()
    parameters = dict(step.student.named_parameters())
    group = GroupOptions(lr=1e-3)
    common: dict[str, Any] = {
        "optim_options": OptimOptions(groups=(group,)),
        "loop": LoopOptions(steps=1),
        "folder": Path("unused"),
    }
    members = [(name, p) for name, p in parameters.items() if name != "norm.bias"]
    with pytest.raises(RunError, match=r"norm\.bias trains but no optim\.groups entry claims it"):
        Trainer(step, Loader(Rows(), 10), groups=[(group, members)], **common)
    parameters["norm.bias"].requires_grad_(False)
    with pytest.raises(RunError, match=r"norm\.bias is in an optim\.groups entry but is frozen"):
        Trainer(step, Loader(Rows(), 10), groups=[(group, list(parameters.items()))], **common)


def test_the_teacher_is_frozen_and_no_part_of_the_student() -> None:
    teacher = Teacher(seed=1)
    step = TrainStep(Student(), [DenseCE()], teacher)
    assert not any(p.requires_grad for p in teacher.module.parameters())
    assert not {id(p) for p in teacher.module.parameters()} & {id(p) for p in step.parameters()}


def test_another_identity_is_refused_with_the_difference(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=4, identity={"data": "a1"}).run()
    with pytest.raises(RunError, match="data: was a1, is b2"):
        make_trainer(tmp_path, steps=4, identity={"data": "b2"}).run()


def test_two_objectives_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    make_trainer(tmp_path, TrainStep(Student(), [DenseCE(0.25), DenseCE(0.75)]), steps=2).run()
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert row["ce.0/raw"] == row["ce.1/raw"] == pytest.approx(row["loss"], rel=1e-6)


def test_a_ramped_weight_follows_the_step(tmp_path: Path) -> None:
    def ramped() -> TrainStep:
        step = make_step("ce")
        step.objectives[0].schedule = Ramp(ramp=(0.0, 1.0), steps=4)
        return step

    make_trainer(tmp_path, ramped(), steps=6, log_every=1).run()
    for row in read_metrics(tmp_path / "metrics.jsonl"):
        expected = min((row["step"] - 1) / 4, 1.0)
        assert row["ce/weighted"] == pytest.approx(expected * row["ce/raw"], rel=1e-6)
