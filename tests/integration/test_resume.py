"""A run that was killed and started again is the run that was never killed, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine_parts import make_step, make_trainer
from limbeck.engine.checkpoint import saved_steps
from limbeck.engine.metrics import read_metrics

TESTS = Path(__file__).parents[1]
SOURCE = TESTS.parent / "src"
CHILD = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from limbeck.engine.checkpoint import Checkpoints
sys.path.insert(0, sys.argv[1])
from integration.test_resume import trainer_for

how, folder = sys.argv[2], Path(sys.argv[3])
kind = how.partition("-")[0]
trainer = trainer_for(folder, kind)
update = trainer._apply

def watched(*args):
    update(*args)
    if how.endswith("step") and trainer.at.step == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    if how.endswith("term") and trainer.at.step == 6:
        os.kill(os.getpid(), signal.SIGTERM)

trainer._apply = watched
if how.endswith("commit"):
    commit = Checkpoints._commit
    def killed(self, temporary, target, step):
        if step == 15:
            os.kill(os.getpid(), signal.SIGKILL)
        commit(self, temporary, target, step)
    Checkpoints._commit = killed
trainer.run()
"""
WAYS = ("kl-step", "stream-step", "kl-commit", "kl-term")


def trainer_for(folder: Path, kind: str):  # type: ignore[no-untyped-def]
    """Dropout, micro-batches, a warm-up and a teacher: whatever could lose a bit on the way."""
    return make_trainer(
        folder,
        make_step(kind, dropout=0.1),
        microbatch=4,
        checkpoint_every=5,
        log_every=3,
        optim={"schedule": {"kind": "cosine", "warmup": 4, "final": 0.1}},
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    for kind in ("kl", "stream"):
        trainer_for(folder / kind, kind).run()
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that really died (or drained), each in a process of its own, side by side."""
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "PYTHONPATH": f"{SOURCE}:{TESTS}", "OMP_NUM_THREADS": "1"}
    children = {
        way: subprocess.Popen(
            [sys.executable, "-c", CHILD, str(TESTS), way, str(folder / way)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for way in WAYS
    }
    for way, child in children.items():
        _, errors = child.communicate(timeout=600)
        assert child.returncode == (0 if way == "kl-term" else -signal.SIGKILL), errors
    return folder


def trace(folder: Path) -> list[str]:
    return [value.hex() for row in read_metrics(folder / "metrics.jsonl") for value in row["losses"]]


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_goes_on_bit_equal(uninterrupted: Path, killed: Path, way: str) -> None:
    folder, whole = killed / way, uninterrupted / way.partition("-")[0]
    expected_steps = {"step": "step_10", "commit": "step_10", "term": "step_7"}[way.partition("-")[2]]
    committed = [path.name for path in saved_steps(folder / "checkpoints").values()]
    assert committed[-1] == expected_steps
    assert (folder / "exit_reason").exists() == way.endswith("term")
    trainer = trainer_for(folder, way.partition("-")[0])
    said: list[str] = []
    trainer.voice.say = said.append  # type: ignore[method-assign]
    result = trainer.run()
    assert f"resumed at step {int(expected_steps[5:])} from {expected_steps}" in said
    assert result.steps == 20
    assert trace(folder) == trace(whole)
    norms = [{row["step"]: row["grad_norm"].hex() for row in read_metrics(f / "metrics.jsonl")} for f in (folder, whole)]
    assert all(norms[0][step] == norm for step, norm in norms[1].items() if step > 10)
    final, expected = (load_file(next((f / "checkpoints" / "final" / "tensors").iterdir())) for f in (folder, whole))
    assert final.keys() == expected.keys()
    assert all(torch.equal(final[name], expected[name]) for name in final)
    assert not list((folder / "checkpoints").glob(".tmp-*"))


def test_a_drained_run_says_so_and_leaves_no_half_line(killed: Path) -> None:
    # Finished meanwhile by the test above or not: the file is one whole word either way.
    assert (killed / "kl-term" / "exit_reason").read_text() in ("preempted\n", "finished\n")
    for line in (killed / "kl-term" / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
