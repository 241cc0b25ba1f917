"""A teacher that answers later: asked before its turn, waited for in order, and never the end of a run."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_parts import DenseKL, Loader, Rows, Student, Teacher, make_trainer
from limbeck.engine.ahead import StepQueue
from limbeck.engine.metrics import loss_trace, read_metrics
from limbeck.engine.step import TrainStep
from limbeck.errors import TeacherError
from limbeck.needs import HeadHidden, Need
from limbeck.types import Batch, Pending, Signal


class Later:
    """An answer that is there after ``delay`` seconds."""

    def __init__(self, batch: Batch, signal: Signal, delay: float, failure: Exception | None = None):
        self.batch, self.signal, self.failure = batch, signal, failure
        self.at = time.monotonic() + delay

    def result(self, timeout: float | None = None) -> tuple[Batch, Signal]:
        left = self.at - time.monotonic()
        if timeout is not None and left > timeout:
            time.sleep(timeout)
            raise TimeoutError
        time.sleep(max(0.0, left))
        if self.failure is not None:
            raise self.failure
        return self.batch, self.signal


class Remote:
    """The in-process teacher of the other tests, behind a delay."""

    module = None
    lookahead = 1

    def __init__(self, delay: float = 0.0, fails_at: int | None = None, **options: Any):
        self.inner = Teacher(**options)
        self.delay, self.fails_at = delay, fails_at
        self.asked: list[float] = []

    def submit(self, batch: Batch, needs: Mapping[type[Need], Need]) -> Pending:
        self.asked.append(time.monotonic())
        failure = TeacherError("the teacher is gone") if len(self.asked) - 1 == self.fails_at else None
        with torch.no_grad():
            return Later(batch, self.inner.signal(batch, needs), self.delay, failure)

    def advice(self) -> str:
        return "raise teacher.in_flight"


def step_with(teacher: Any) -> TrainStep:
    return TrainStep(Student(), [DenseKL()], teacher, {HeadHidden: HeadHidden()})


def test_a_teacher_that_answers_later_gives_the_same_training(tmp_path: Path) -> None:
    make_trainer(tmp_path / "here", step_with(Teacher(seed=7)), steps=6, microbatch=3).run()
    make_trainer(tmp_path / "there", step_with(Remote(seed=7)), steps=6, microbatch=3).run()
    traces = [loss_trace(tmp_path / name / "metrics.jsonl") for name in ("here", "there")]
    assert traces[0] == traces[1]


def test_the_next_step_is_asked_for_before_this_one_trains() -> None:
    loader, teacher = Loader(Rows(), 8), Remote(seed=7)
    queue = StepQueue(loader, step_with(teacher), microbatch=2, num_steps=3)
    queue.first()
    assert len(teacher.asked) == 4
    queue.advance()
    assert len(teacher.asked) == 8, "asked while the first step has yet to train"
    queue.advance()
    queue.advance()
    assert len(teacher.asked) == 12, "nothing is asked beyond the budget"


def test_the_position_saved_is_that_of_the_first_step_not_done() -> None:
    loader = Loader(Rows(), 8)
    positions = []
    for _ in range(4):
        positions.append(loader.state())
        loader.next_step()
    loader.restore(positions[0])
    queue = StepQueue(loader, step_with(Remote(seed=7)), microbatch=None, num_steps=3)
    for position in positions[:3]:
        assert queue.first().position == position == queue.position
        queue.advance()
    assert queue.position == positions[3]


def test_a_lost_teacher_ends_the_run_saved_and_it_goes_on_bit_equal(tmp_path: Path) -> None:
    make_trainer(tmp_path / "whole", step_with(Remote(seed=7)), steps=8).run()
    with pytest.raises(TeacherError, match="gone"):
        make_trainer(tmp_path / "cut", step_with(Remote(seed=7, fails_at=5)), steps=8).run()
    assert read_metrics(tmp_path / "cut" / "metrics.jsonl")[-1]["step"] == 5
    make_trainer(tmp_path / "cut", step_with(Remote(seed=7)), steps=8).run()
    traces = [loss_trace(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut")]
    assert traces[0] == traces[1]


def test_a_teacher_lost_in_validation_ends_the_run_saved(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 6, "validation_rows": Rows(seed=5), "validate_every": 3, "validate_rows": 10}
    make_trainer(tmp_path / "whole", step_with(Remote(seed=7)), **options).run()
    with pytest.raises(TeacherError, match="gone"):
        # The rows of three steps and of the next one were asked for when the first held-out rows are.
        make_trainer(tmp_path / "cut", step_with(Remote(seed=7, fails_at=4)), **options).run()
    resumed = make_trainer(tmp_path / "cut", step_with(Remote(seed=7)), **options)
    resumed.run()
    assert resumed.began_step == 3, "nothing was trained twice"
    traces = [loss_trace(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut")]
    assert traces[0] == traces[1]


def test_a_stop_signal_is_obeyed_while_the_teacher_is_away(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, step_with(Remote(delay=60, seed=7)), steps=4)
    threading.Timer(0.5, lambda: signal.raise_signal(signal.SIGTERM)).start()
    began = time.monotonic()
    assert trainer.run().exit_reason == "preempted"
    assert time.monotonic() - began < 20


def test_what_was_not_answered_does_not_count(tmp_path: Path) -> None:
    class Half(Remote):
        def submit(self, batch: Batch, needs: Mapping[type[Need], Need]) -> Pending:
            mask_BT = torch.arange(batch.labels_BT.shape[1]) % 2 == 0
            answered = replace(batch, labels_BT=batch.labels_BT.masked_fill(~mask_BT, -100))
            with torch.no_grad():
                return Later(answered, self.inner.signal(batch, needs), 0.0)

    class Masked(Rows):
        """The same rows, of which only what :class:`Half` answers was ever to count."""

        def batch(self, indices: Any) -> Batch:
            whole = super().batch(indices)
            return replace(whole, labels_BT=whole.labels_BT.masked_fill(torch.arange(whole.labels_BT.shape[1]) % 2 != 0, -100))

    make_trainer(tmp_path / "half", step_with(Half(seed=7)), steps=3).run()
    make_trainer(tmp_path / "masked", step_with(Remote(seed=7)), rows=Masked(), steps=3).run()
    make_trainer(tmp_path / "whole", step_with(Remote(seed=7)), steps=3).run()
    traces = {name: loss_trace(tmp_path / name / "metrics.jsonl") for name in ("half", "masked", "whole")}
    assert traces["half"] == traces["masked"] != traces["whole"]


def test_a_run_that_waits_says_what_to_change_once(tmp_path: Path) -> None:
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), force_terminal=False, width=200)
    make_trainer(tmp_path, step_with(Remote(delay=0.1, seed=7)), steps=4, console=console, log_every=1).run()
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said.count("raise teacher.in_flight") == 1
    shares = [json.loads(line)["teacher_share"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(shares) > 0.2
