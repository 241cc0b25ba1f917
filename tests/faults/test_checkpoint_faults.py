"""The order of what a save does, a clock that jumps, a name that is taken, files that come late, and signals in the middle of it all."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_parts import make_step, make_trainer
from limbeck.engine import checkpoint
from limbeck.engine.checkpoint import MANIFEST, Checkpoints, damage, saved_steps
from limbeck.engine.metrics import loss_trace
from limbeck.engine.parallel import World
from limbeck.errors import CheckpointError


def store(folder: Path, said: list[str] | None = None, **options: Any) -> Checkpoints:
    return Checkpoints(folder, World(torch.device("cpu")), **{"keep_last": 2, **options}, say=(said if said is not None else []).append)


def tensors(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"model/w": torch.full((3, 4), value), "exp_avg/w": torch.full((3, 4), value)}


def test_everything_is_on_disk_before_it_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power may fail between any two calls: files, then the manifest, then folders, then the name, then the folder that holds it."""
    calls: list[tuple[str, str]] = []
    sync, rename = checkpoint.fsync, os.rename

    def synced(path: Path) -> None:
        calls.append(("fsync", path.relative_to(tmp_path).as_posix().partition("/")[2] or path.name))
        sync(path)

    def renamed(source: Any, target: Any) -> None:
        calls.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(checkpoint, "fsync", synced)
    monkeypatch.setattr(checkpoint.os, "rename", renamed)
    path = store(tmp_path).save(1, tensors(), {}, {})
    order = [name for _, name in calls]
    commit = order.index("step_1")
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert files <= set(order[:commit]), files - set(order[:commit])
    assert max(order.index(name) for name in files - {MANIFEST}) < order.index(MANIFEST) < order.index("tensors") < commit
    assert calls[commit][0] == "rename" and calls[commit + 1] == ("fsync", tmp_path.name)


@pytest.mark.parametrize("jump", [-10 * 365 * 86400, 10 * 365 * 86400])
def test_a_clock_that_jumps_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    make_trainer(tmp_path / "whole", checkpoint_every=5).run()
    trainer, now = make_trainer(tmp_path / "jumped", checkpoint_every=5), time.time
    apply = trainer._apply

    def watched(*args: Any) -> None:
        apply(*args)
        if trainer.at.step == 8:
            monkeypatch.setattr(time, "time", lambda: now() + jump)

    monkeypatch.setattr(trainer, "_apply", watched)
    assert trainer.run().steps == 20
    assert list(saved_steps(tmp_path / "jumped" / "checkpoints")) == [10, 15]
    for step, path in saved_steps(tmp_path / "jumped" / "checkpoints").items():
        # Older by the file system's clock than what came before it: the step alone says which is the newest.
        os.utime(path, (10_000 - step, 10_000 - step))
    shutil.rmtree(tmp_path / "jumped" / "checkpoints" / "final")
    again = make_trainer(tmp_path / "jumped", checkpoint_every=5)
    said: list[str] = []
    again.voice.say = said.append  # type: ignore[method-assign]
    again.run()
    assert "resumed at step 15 from step_15" in said
    assert loss_trace(tmp_path / "jumped" / "metrics.jsonl") == loss_trace(tmp_path / "whole" / "metrics.jsonl")


def test_a_name_that_is_taken_is_given_to_the_newer_one(tmp_path: Path) -> None:
    """A step that is done again after a fall-back, and leftovers of a process with our number."""
    checkpoints = store(tmp_path)
    checkpoints.save(3, tensors(1.0), {}, {})
    left = tmp_path / f".tmp-step_3-{os.getpid()}"
    left.mkdir()
    (left / "junk").write_text("half")
    store(tmp_path).save(3, tensors(2.0), {}, {})
    filled = tensors()
    loaded = store(tmp_path).load(filled)
    assert loaded is not None and loaded.step == 3 and torch.equal(filled["model/w"], tensors(2.0)["model/w"])
    assert [path.name for path in tmp_path.iterdir()] == ["step_3"]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_signal_in_the_middle_of_a_save_ends_the_run_with_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, background: bool
) -> None:
    make_trainer(tmp_path / "whole", make_step("kl", dropout=0.1), checkpoint_every=5).run()
    write, told = Checkpoints._write, threading.Event()

    def interrupted(self: Checkpoints, temporary: Path, *args: Any) -> None:
        write(self, temporary, *args)
        if "step_10-" in temporary.name and not told.is_set():
            told.set()
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Checkpoints, "_write", interrupted)
    options = {"checkpoint_every": 5, "save_in_background": background}
    result = make_trainer(tmp_path / "told", make_step("kl", dropout=0.1), **options).run()
    assert result.exit_reason == "preempted" and told.is_set()
    steps = saved_steps(tmp_path / "told" / "checkpoints")
    assert 10 <= max(steps) == result.steps < 20 and all(damage(path) is None for path in steps.values())
    assert not list((tmp_path / "told" / "checkpoints").glob(".tmp-*"))
    assert make_trainer(tmp_path / "told", make_step("kl", dropout=0.1), **options).run().steps == 20
    assert loss_trace(tmp_path / "told" / "metrics.jsonl") == loss_trace(tmp_path / "whole" / "metrics.jsonl")


def test_final_alone_is_enough_to_go_on_from(tmp_path: Path) -> None:
    make_trainer(tmp_path, checkpoint_every=5, steps=10).run()
    for path in saved_steps(tmp_path / "checkpoints").values():
        shutil.rmtree(path)
    assert make_trainer(tmp_path, checkpoint_every=5, steps=12).run().steps == 12


def test_a_folder_that_cannot_be_written_is_named_and_what_was_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(1, tensors(1.0), {}, {})
    mkdir = Path.mkdir

    def refused(self: Path, *args: Any, **options: Any) -> None:
        if ".tmp-step_2" in str(self):
            raise PermissionError(13, "Permission denied", str(self))
        mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(Exception, match=r"could not be written: .*Permission denied"):
        checkpoints.save(2, tensors(2.0), {}, {})
    loaded = checkpoints.load(tensors())
    assert loaded is not None and loaded.step == 1


def test_files_that_are_seen_late_are_waited_for_and_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that several machines share."""
    store(tmp_path).save(1, tensors(1.0), {}, {})
    exists, late = Path.exists, [3]

    def hidden(self: Path, **options: Any) -> bool:
        if self.name == "state.json" and late[0]:
            late[0] -= 1
            return False
        return exists(self, **options)

    monkeypatch.setattr(Path, "exists", hidden)
    assert store(tmp_path).load(tensors()) is not None and late == [0]
    late[0] = 10**6
    monkeypatch.setattr(checkpoint, "LATE", 0.2)
    with pytest.raises(CheckpointError, match=r"state.json: is not there after 0.2 s, although another rank has written it"):
        store(tmp_path).load(tensors())


def test_a_file_that_one_rank_does_not_see_yet_is_still_in_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks on machines that see each other's files late: simulated by what the other rank reports."""
    checkpoints = store(tmp_path)
    listings, real = [], Checkpoints._written

    class Late(World):
        def gather(self, values: list[int]) -> torch.Tensor:
            listings.append(values[0])
            # The other rank sees something else at first, then the same.
            return torch.tensor([values, [values[0] + (len(listings) < 3), values[1]]])

    def written(self: Checkpoints, temporary: Path) -> list[Path]:
        return real(type("Seen", (), {"world": Late(torch.device("cpu"))})(), temporary)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoints, "_written", written)
    path = checkpoints.save(1, tensors(), {}, {})
    assert len(listings) == 3 and damage(path) is None
