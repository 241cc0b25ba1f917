"""When memory or a disk does not suffice: what fits is found and said, nothing is lost."""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_parts import make_step, make_trainer
from limbeck.engine import checkpoint
from limbeck.engine.checkpoint import NoSpace
from limbeck.engine.metrics import loss_trace, read_metrics
from limbeck.engine.step import TrainStep
from limbeck.errors import RunError
from limbeck.types import Batch, Signal


def tight(limit: int, kind: str = "ce") -> tuple[TrainStep, dict[int, int]]:
    """A step for which no more than ``limit`` rows fit; beside it, how often each number of rows was tried."""
    step, tried = make_step(kind), defaultdict(int)
    run = step.run

    def bounded(batch: Batch, signal: Signal, scales: Any) -> Any:
        rows = batch.input_ids_BT.shape[0]
        tried[rows] += 1
        found = run(batch, signal, scales)  # gradients and metrics of what did not fit must leave no trace
        if rows > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    step.run = bounded  # type: ignore[method-assign, assignment]
    return step, tried


@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_halving_the_micro_batch_takes_the_same_steps(tmp_path: Path, kind: str) -> None:
    make_trainer(tmp_path / "whole", make_step(kind), steps=6, precision="float32", log_every=1).run()
    step, tried = tight(3, kind)
    trainer = make_trainer(tmp_path / "halved", step, steps=6, precision="float32", log_every=1, on_out_of_memory="halve")
    said: list[str] = []
    trainer.voice.say = said.append  # type: ignore[method-assign]
    trainer.run()
    assert loss_trace(tmp_path / "halved" / "metrics.jsonl") == pytest.approx(loss_trace(tmp_path / "whole" / "metrics.jsonl"), rel=1e-5)
    whole, halved = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "halved"))
    assert [row["ce"] for row in halved] == pytest.approx([row["ce"] for row in whole], rel=1e-5)
    assert sum("10 rows a micro-batch; 3 fit" in line for line in said) == 1
    # Found once: what comes later begins with what fits.
    assert tried[10] == 1 and tried[5] == 1


def test_without_leave_the_run_stops_and_names_what_fits(tmp_path: Path) -> None:
    step, _ = tight(2)
    with pytest.raises(RunError, match=r"at step 1 with 10 rows a micro-batch; 2 fit \(tried\): set loop.microbatch: 2"):
        make_trainer(tmp_path, step, steps=6).run()
    assert (tmp_path / "exit_reason").read_text() == "failed\n"


def test_when_one_row_does_not_fit_the_other_ways_are_named(tmp_path: Path) -> None:
    step, _ = tight(0)
    with pytest.raises(RunError, match=r"out of memory at step 1: lower .*data.sequence \(now 24\).*activation_checkpointing"):
        make_trainer(tmp_path, step, steps=6, on_out_of_memory="halve").run()


def disk(monkeypatch: pytest.MonkeyPatch, total: float, free: float) -> None:
    usage = shutil._ntuple_diskusage(int(total), int(total - free), int(free))  # type: ignore[attr-defined]
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)


def test_a_run_whose_checkpoints_cannot_all_be_there_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk(monkeypatch, 1e9, 3.5e6)
    with pytest.raises(NoSpace, match=r"4 checkpoints of 1\.11MB are there at one time, and 3.5MB are free: .*loop.keep_last"):
        make_trainer(tmp_path / "a", steps=10, keep_last=3, checkpoint_every=1).run()
    assert not (tmp_path / "a" / "metrics.jsonl").exists()
    # Fewer are kept, or fewer are ever written: there is room.
    assert make_trainer(tmp_path / "b", steps=10, keep_last=2, checkpoint_every=1).run().exit_reason == "finished"
    assert make_trainer(tmp_path / "c", steps=10, keep_last=3, checkpoint_every=5).run().exit_reason == "finished"


def test_a_run_that_goes_on_counts_the_checkpoints_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, steps=10, keep_last=2, checkpoint_every=2)
    ends = {6: KeyboardInterrupt}
    apply = trainer._apply

    def interrupted(loss: torch.Tensor) -> None:
        apply(loss)
        if trainer.at.step + 1 in ends:
            raise ends[trainer.at.step + 1]

    trainer._apply = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    held = sum(p.stat().st_size for p in (tmp_path / "checkpoints").rglob("*") if p.is_file())
    disk(monkeypatch, 1e9, 3.4e6 - held)
    assert make_trainer(tmp_path, steps=10, keep_last=2, checkpoint_every=2).run().exit_reason == "finished"


def test_keep_last_0_keeps_all(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=5, keep_last=0, checkpoint_every=1).run()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["final", "step_1", "step_2", "step_3", "step_4"]


def test_a_disk_that_fills_is_told_at_every_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, steps=4, checkpoint_every=1)
    said: list[str] = []
    trainer.voice.say = said.append  # type: ignore[method-assign]
    left = iter([9.5e8] * 2 + [147e9, 147e9, 100e9])
    usage = lambda path: shutil._ntuple_diskusage(int(1.8e12), 0, int(next(left, 100e9)))  # type: ignore[attr-defined]  # noqa: E731
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", usage)
    trainer.run()
    warnings = [line for line in said if line.startswith("WARNING: Disk")]
    assert warnings[0] == "WARNING: Disk 99% full (950MB / 1.8TB available)"
    disk(monkeypatch, 1.8e12, 147e9)
    told: list[str] = []
    store = checkpoint.Checkpoints(tmp_path / "other", trainer.world, keep_last=2, say=told.append)
    for step in (1, 2):
        store.save(step, {"w": torch.zeros(2)}, {}, {})
    disk(monkeypatch, 1.8e12, 100e9)
    store.save(3, {"w": torch.zeros(2)}, {}, {})
    assert told == ["WARNING: Disk 91% full (147GB / 1.8TB available)", "WARNING: Disk 94% full (100GB / 1.8TB available)"]


def test_the_log_holds_steps_saves_and_cleanings(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, steps=8, keep_last=2, checkpoint_every=2, log_every=4)
    trainer.run()
    lines = (tmp_path / "training.log").read_text().splitlines()
    where = tmp_path / "checkpoints"
    steps = [line for line in lines if line.startswith("[")]
    assert [line.split("]")[0] for line in steps] == [f"[     {step}/      8" for step in (1, 2, 4, 6, 8)]
    assert all(re.fullmatch(r"\[ +\d+/ +\d+\] loss=\d+\.\d\d lr=\d\.\d{3} gnorm=\d+\.\d tok/s=\d+ elapsed=\d+s", line) for line in steps)
    saved = [line for line in lines if line.startswith("  -> checkpoint saved to ")]
    assert [re.fullmatch(rf"  -> checkpoint saved to {where}/(\w+) \([\d.]+(?:k|M|G|T)B\)", line)[1] for line in saved] == [  # type: ignore[index]
        "step_2", "step_4", "step_6", "final",
    ]  # fmt: skip
    assert lines.count("  Cleaned 1 old checkpoint(s), keeping last 2") == 1


@pytest.mark.parametrize(("until", "decaying"), [(0.5, 5), (1.0, 10), (0.01, 1)])
def test_weights_stop_decaying_where_they_are_told_to(tmp_path: Path, until: float, decaying: int) -> None:
    trainer = make_trainer(tmp_path, optim={"decay_until": until}, steps=10)
    apply, seen = trainer._apply, []

    def watched(loss: torch.Tensor) -> None:
        apply(loss)
        seen.append({group["weight_decay"] for group in trainer.optimizer.param_groups})

    trainer._apply = watched  # type: ignore[method-assign]
    trainer.run()
    # Vectors never decay.
    assert seen == [{0.1, 0.0}] * decaying + [{0.0}] * (10 - decaying)


def test_the_log_warns_of_a_disk_that_is_nearly_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk(monkeypatch, 1.8e12, 147e9)
    assert make_trainer(tmp_path, steps=4, checkpoint_every=2).run().exit_reason == "finished"
    assert (tmp_path / "training.log").read_text().splitlines().count("WARNING: Disk 91% full (147GB / 1.8TB available)") == 1


@pytest.mark.parametrize(("size", "shown"), [(162e9, "162GB"), (1.8e12, "1.8TB"), (999.6e6, "1GB"), (999.4e6, "999MB"), (2e15, "2PB"), (1500, "1.5kB")])
def test_sizes_have_three_digits(size: float, shown: str) -> None:
    assert checkpoint.space(size) == shown


def test_a_log_that_cannot_be_written_is_said_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "training.log").mkdir()
    assert make_trainer(tmp_path, steps=2).run().exit_reason == "finished"
