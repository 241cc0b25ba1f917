"""Checkpoints: whole or not there, and never believed without proof."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_parts import make_step, make_trainer
from limbeck.engine import checkpoint
from limbeck.engine.checkpoint import Checkpoints, NoSpace, damage
from limbeck.engine.metrics import loss_trace
from limbeck.engine.parallel import World
from limbeck.errors import CheckpointError, RunError


def checkpoints(folder: Path, keep_last: int = 2, said: list[str] | None = None) -> Checkpoints:
    return Checkpoints(folder, World(torch.device("cpu")), keep_last=keep_last, say=(said if said is not None else []).append)


def tensors(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {
        "model/w": torch.full((3, 4), value),
        "step/w": torch.tensor(value),
        "buffer/ids": torch.arange(5),
        "exp_avg/w": torch.full((3, 4), value).bfloat16(),
    }


def test_what_is_saved_is_loaded_in_place(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    store.save(3, tensors(1.5), {"align/0": torch.tensor(2.0)}, {"tokens": 7})
    filled = tensors()
    loaded = store.load(filled)
    assert loaded is not None
    assert (loaded.step, loaded.state["tokens"], loaded.objectives["align/0"].item()) == (3, 7, 2.0)
    assert all(torch.equal(filled[name], value) for name, value in tensors(1.5).items())


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    path = checkpoints(tmp_path).save(3, tensors(), {}, {})
    assert {p.suffix for p in path.rglob("*") if p.is_file()} == {".safetensors", ".json"}


def test_pruning_keeps_the_newest_and_the_final_one(tmp_path: Path) -> None:
    store = checkpoints(tmp_path, keep_last=2)
    store.save(1, tensors(), {}, {}, final=True)
    for step in range(2, 6):
        store.save(step, tensors(), {}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final", "step_4", "step_5"]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Any] = {
    "has changed since it was written": lambda step: _flip(next((step / "tensors").iterdir())),
    "bytes instead of": lambda step: os.truncate(next((step / "tensors").iterdir()), 100),
    "rng-0-of-1.json is missing": lambda step: (step / "rng-0-of-1.json").unlink(),
    "is not listed in its manifest": lambda step: (step / "tensors" / "stray.safetensors").write_bytes(b"x"),
    "it has no MANIFEST.json": lambda step: (step / "MANIFEST.json").unlink(),
    "its MANIFEST.json cannot be read": lambda step: (step / "MANIFEST.json").write_text("{"),
}


@pytest.mark.parametrize("word", DAMAGES)
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_it_used(tmp_path: Path, word: str) -> None:
    said: list[str] = []
    store = checkpoints(tmp_path, said=said)
    store.save(1, tensors(1.0), {}, {})
    newest = store.save(2, tensors(2.0), {}, {})
    assert damage(newest) is None
    DAMAGES[word](newest)
    filled = tensors()
    loaded = store.load(filled)
    assert loaded is not None
    assert loaded.step == 1
    assert filled["model/w"][0, 0] == 1.0
    assert len(said) == 1
    assert "step_2 is damaged" in said[0]
    assert word in said[0]
    assert len(list(tmp_path.glob(".corrupt-step_2-*"))) == 1


def test_when_no_checkpoint_is_whole_the_run_does_not_silently_begin_again(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    _flip(next((store.save(1, tensors(), {}, {}) / "tensors").iterdir()))
    with pytest.raises(CheckpointError, match="no checkpoint in it is whole"):
        store.load(tensors())


def test_a_step_deleted_by_hand_is_no_error(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    store.save(1, tensors(1.0), {}, {})
    shutil.rmtree(store.save(2, tensors(2.0), {}, {}))
    loaded = store.load(tensors())
    assert loaded is not None
    assert loaded.step == 1


def test_leftovers_of_a_dead_save_are_swept_and_never_read(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step_9-1" / "tensors").mkdir(parents=True)
    (tmp_path / "old-step-9").mkdir()
    store = checkpoints(tmp_path)
    assert not (tmp_path / ".tmp-step_9-1").exists()
    assert store.load(tensors()) is None


def test_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    store.save(1, tensors(), {}, {})
    other = {**tensors(), "model/w": torch.zeros(2, 4), "model/new": torch.zeros(1)}
    with pytest.raises(
        CheckpointError, match=r"model/new: checkpoint has none, run \[1\]; model/w: checkpoint \[3, 4\], run \[2, 4\]"
    ):
        store.load(other)


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = checkpoints(tmp_path)
    store.save(1, tensors(), {}, {})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5, 5))  # type: ignore[attr-defined]
    with pytest.raises(NoSpace, match=r"a checkpoint needs 1\.05MB and 0\.005kB are free"):
        store.save(2, tensors(), {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


def test_a_nearly_full_disk_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    store = checkpoints(tmp_path, said=said)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 95 * 10**7, 5 * 10**7))  # type: ignore[attr-defined]
    store.save(1, tensors(), {}, {})
    store.save(2, tensors(), {}, {})
    assert said == ["WARNING: Disk 95% full (50MB / 1GB available)"]


def test_a_full_disk_ends_the_save_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trainer(tmp_path / "whole", checkpoint_every=5).run()
    trainer = make_trainer(tmp_path / "full", checkpoint_every=5)
    said: list[str] = []
    trainer.voice.say = said.append  # type: ignore[method-assign]
    write = Checkpoints._write

    def full(self: Checkpoints, temporary: Path, *args: Any) -> None:
        if "step_10-" in temporary.name:
            (temporary / "tensors" / "half.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, temporary, *args)

    monkeypatch.setattr(Checkpoints, "_write", full)
    assert trainer.run().exit_reason == "finished"
    assert sum("WARNING" in line and "no space left" in line for line in said) == 1
    assert sorted(p.name for p in (tmp_path / "full" / "checkpoints").iterdir()) == ["final", "step_15", "step_5"]
    assert loss_trace(tmp_path / "full" / "metrics.jsonl") == loss_trace(tmp_path / "whole" / "metrics.jsonl")


def test_a_limit_on_file_size_is_told_as_a_lack_of_space(tmp_path: Path) -> None:
    # In a process of its own: the limit cannot be lifted again, and it would hit pytest's own files.
    script = f"""
import resource, signal, sys, torch
from pathlib import Path
from limbeck.engine.checkpoint import Checkpoints, NoSpace
from limbeck.engine.parallel import World
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Checkpoints(Path({str(tmp_path)!r}), World(torch.device("cpu")), keep_last=2, say=print)
small, big = {{"w": torch.zeros(10)}}, {{"w": torch.zeros(100_000)}}
store.save(1, small, {{}}, {{}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    store.save(2, big, {{}}, {{}})
except NoSpace as error:
    print("told:", error)
assert store.load(small).step == 1
"""
    source = str(Path(checkpoint.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": source}, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "told:" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


def test_two_processes_do_not_share_a_run_folder(tmp_path: Path) -> None:
    from limbeck.engine.lock import RunLock

    with RunLock(tmp_path), pytest.raises(RunError, match=rf"in use by process {os.getpid()} on"):
        make_trainer(tmp_path).run()
    # A lock that a dead process left behind does not count: only a held one does.
    assert (tmp_path / "LOCK").exists()
    assert make_trainer(tmp_path, make_step(), steps=2).run().steps == 2
