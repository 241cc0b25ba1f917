"""Saves in the background, the two tiers of what is kept, and the canary."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine_parts import Rows, make_step, make_trainer
from limbeck.engine.checkpoint import Checkpoints, damage, saved_steps
from limbeck.engine.metrics import loss_trace
from limbeck.engine.parallel import World
from limbeck.errors import CheckpointError, RunError

DROPOUT = {"checkpoint_every": 4, "keep_last": 0}


def run(folder: Path, **options: Any) -> list[str]:
    """Train to the end; what was said."""
    trainer = make_trainer(folder, make_step("kl", dropout=0.1), **{**DROPOUT, **options})
    said: list[str] = []
    trainer.voice.say = said.append  # type: ignore[method-assign]
    trainer.run()
    return said


def test_saving_in_the_background_changes_no_bit_of_what_is_saved_or_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "plain")
    at_once, write = threading.Event(), Checkpoints._write

    def slowly(self: Checkpoints, temporary: Path, *args: Any) -> None:
        # The next step has changed every weight before the first one is written.
        if "step_4-" in temporary.name:
            assert at_once.wait(20)
        write(self, temporary, *args)

    monkeypatch.setattr(Checkpoints, "_write", slowly)
    trainer = make_trainer(tmp_path / "behind", make_step("kl", dropout=0.1), **DROPOUT, save_in_background=True)
    apply = trainer._apply

    def watched(*args: Any) -> None:
        apply(*args)
        if trainer.at.step == 5:
            assert not (tmp_path / "behind" / "checkpoints" / "step_4").exists()
            at_once.set()

    monkeypatch.setattr(trainer, "_apply", watched)
    trainer.run()
    assert loss_trace(tmp_path / "behind" / "metrics.jsonl") == loss_trace(tmp_path / "plain" / "metrics.jsonl")
    mine, theirs = (saved_steps(tmp_path / name / "checkpoints") for name in ("behind", "plain"))
    assert list(mine) == list(theirs) == [4, 8, 12, 16]
    for step, path in mine.items():
        assert damage(path) is None
        for file in sorted(path.rglob("*.safetensors")):
            other = load_file(theirs[step] / file.relative_to(path))
            assert all(torch.equal(tensor, other[name]) for name, tensor in load_file(file).items()), file


def test_one_save_is_under_way_at_a_time_and_the_last_is_there_when_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy, most, write = [0], [0], Checkpoints._write

    def counted(self: Checkpoints, *args: Any) -> None:
        busy[0] += 1
        most[0] = max(most[0], busy[0])
        write(self, *args)
        busy[0] -= 1

    monkeypatch.setattr(Checkpoints, "_write", counted)
    run(tmp_path, checkpoint_every=1, save_in_background=True)
    assert most == [1] and busy == [0]
    assert len(saved_steps(tmp_path / "checkpoints")) == 19 and damage(tmp_path / "checkpoints" / "final") is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_save_that_fails_in_the_background_is_told_before_the_next_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    write, under_way = Checkpoints._write, threading.Event()

    def fails(self: Checkpoints, temporary: Path, *args: Any) -> None:
        if "step_8-" in temporary.name:
            # Not before the next step has begun: at its beginning a failure would be told already.
            assert under_way.wait(60)
            raise OSError(number, "injected")
        write(self, temporary, *args)

    monkeypatch.setattr(Checkpoints, "_write", fails)
    trainer = make_trainer(tmp_path, make_step(), **DROPOUT, save_in_background=True)
    said: list[tuple[int, str]] = []
    trainer.voice.say = lambda text: said.append((trainer.at.step, text))  # type: ignore[method-assign]
    apply = trainer._apply

    def watched(*args: Any) -> None:
        if trainer.at.step == 8:
            under_way.set()
            while not trainer.checkpoints.failed:
                time.sleep(0.01)
        apply(*args)

    monkeypatch.setattr(trainer, "_apply", watched)
    if number == errno.EIO:
        with pytest.raises(CheckpointError, match="could not be written"):
            trainer.run()
        assert trainer.at.step == 9
        assert list(saved_steps(tmp_path / "checkpoints")) == [4]
    else:
        trainer.run()
        assert [step for step, text in said if "no space left" in text] == [9]
        assert list(saved_steps(tmp_path / "checkpoints")) == [4, 12, 16]
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_rare_checkpoints_are_kept_beside_the_newest(tmp_path: Path) -> None:
    run(tmp_path, checkpoint_every=2, keep_last=1, keep_every=6)
    assert list(saved_steps(tmp_path / "checkpoints")) == [6, 12, 18]
    store = Checkpoints(tmp_path / "few", World(torch.device("cpu")), keep_last=2, keep_every=3, say=print)
    for step in range(1, 9):
        store.save(step, {"w": torch.zeros(2)}, {}, {})
    assert list(saved_steps(tmp_path / "few")) == [3, 6, 7, 8]


@pytest.mark.parametrize("kind", ["kl", "stream"])
def test_weights_that_give_other_numbers_than_when_they_were_saved_are_refused(tmp_path: Path, kind: str) -> None:
    def trainer(steps: int, **options: Any) -> Any:
        return make_trainer(tmp_path, make_step(kind), steps=steps, **options)

    trainer(6).run()
    assert trainer(8).run().steps == 8
    changed = trainer(10)
    # What no checkpoint holds: the frozen part of a student, or the code of its forward pass.
    student = changed.train_step.student
    for block in student.blocks if kind == "kl" else [mixer.outer for mixer in student.mixers().values()]:
        block.register_forward_hook(lambda module, args, out: out * 1.01)
    with pytest.raises(RunError, match=r"final was read whole and is not what it was: its first rows had loss .* loop.canary=false"):
        changed.run()
    assert make_trainer(tmp_path, make_step(kind), steps=10, canary=False).run().steps == 10


@pytest.mark.parametrize("exact", [True, False])
def test_where_kernels_are_not_deterministic_the_last_digits_are_no_difference(tmp_path: Path, exact: bool) -> None:
    make_trainer(tmp_path, make_step(), steps=2, deterministic=exact).run()
    later = make_trainer(tmp_path, make_step(), steps=3, deterministic=exact)
    assert later.canary is not None
    score = later.canary.score
    later.canary.score = lambda *args: (score(*args) or 0.0) * (1 + 1e-5)  # type: ignore[method-assign]
    if exact:
        with pytest.raises(RunError, match="is not what it was"):
            later.run()
    else:
        assert later.run().steps == 3


def test_the_canary_does_not_move_the_training(tmp_path: Path) -> None:
    run(tmp_path / "with")
    run(tmp_path / "without", canary=False)
    assert loss_trace(tmp_path / "with" / "metrics.jsonl") == loss_trace(tmp_path / "without" / "metrics.jsonl")


def test_a_model_without_finite_numbers_is_saved_all_the_same(tmp_path: Path) -> None:
    step = make_step()
    trainer = make_trainer(tmp_path, step, rows=Rows(8), steps=2, on_nonfinite="skip")
    with torch.no_grad():
        step.student.norm.weight.fill_(torch.nan)
    assert trainer.run().steps == 2
    assert make_trainer(tmp_path, make_step(), rows=Rows(8), steps=3, on_nonfinite="skip").run().steps == 3
