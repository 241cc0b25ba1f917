"""Real processes in a stage that is no training: a stop signal ends them as Ctrl-C does, and the run says how each start ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from limbeck.config.load import load_recipe
from limbeck.config.parts.stages import STAGES
from limbeck.errors import RunError
from limbeck.stages.folder import EXIT_REASON
from limbeck.stages.run import run_recipe

PLUGIN = """
import time
from pathlib import Path
from typing import Literal

from limbeck.config.parts.stages import STAGES, StageOptions


class WaitsOptions(StageOptions):
    kind: Literal["waits"] = "waits"


class Waits:
    def __init__(self, context):
        self.context = context

    def run(self):
        if self.context.world.rank == 0:
            (self.context.run_dir / "under-way").touch()
            end = time.monotonic() + 120
            while time.monotonic() < end and not (self.context.recipe_dir / "go").exists():
                time.sleep(0.05)
            if (self.context.recipe_dir / "fail").exists():
                raise ValueError("no")
        self.context.world.barrier()


STAGES.add(WaitsOptions, Waits)
"""
RECIPE = "name: waiting\nplugins: [waits.py]\nstages: {one: {kind: waits}}\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with one stage, which is no training and does not end by itself."""
    for name in ("_options", "_implementations"):
        monkeypatch.setattr(STAGES, name, dict(getattr(STAGES, name)))
    (tmp_path / "waits.py").write_text(PLUGIN)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def start(home: Path, *launcher: str) -> subprocess.Popen[str]:
    words = [sys.executable, *launcher, "-m", "limbeck", "run", "recipe.yaml", "--run-dir", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # Tests that run in the background of a shell have SIGINT ignored, and so would what they start.
    process = subprocess.Popen(
        words,
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 240
    while not (home / "run/under-way").exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    return process


def ended(home: Path) -> tuple[str, str]:
    return (home / "run" / EXIT_REASON).read_text().strip(), json.loads((home / "run/one/stage.json").read_text())["status"]


def test_a_stage_that_is_no_training_ends_by_sigusr1_as_by_ctrl_c_and_is_gone_on_with(home: Path) -> None:
    told = {}
    for number in (signal.SIGINT, signal.SIGUSR1):
        process = start(home)
        assert not (home / "run" / EXIT_REASON).exists(), "while it runs there is none, whatever the last start left"
        process.send_signal(number)
        told[number] = (process.communicate()[0].splitlines()[-1], process.returncode, ended(home))
        (home / "run/under-way").unlink()
    assert told[signal.SIGUSR1] == told[signal.SIGINT]
    assert told[signal.SIGINT] == ("limbeck: interrupted; the same command goes on where it stopped", 130, ("preempted", "preempted"))
    (home / "go").touch()
    run_recipe(load_recipe(home / "recipe.yaml"), recipe_dir=home, run_dir=home / "run", say=lambda line: None)
    assert ended(home) == ("finished", "finished")


def test_two_ranks_end_together_though_one_waits_for_the_other(home: Path) -> None:
    process = start(
        home, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "0",
        "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1",
    )  # fmt: skip
    process.send_signal(signal.SIGUSR1)
    said = process.communicate()[0]
    assert ended(home) == ("preempted", "preempted"), said
    assert said.count("limbeck: interrupted") == 2, said
    assert "Traceback" not in said.partition("SignalException")[0].rpartition("Traceback")[0], "what torchrun says of itself is its own"


def test_a_start_that_fails_or_is_refused_or_killed_says_so(home: Path) -> None:
    (home / "go").touch()
    (home / "fail").touch()
    recipe: Any = load_recipe(home / "recipe.yaml")
    with pytest.raises(ValueError):
        run_recipe(recipe, recipe_dir=home, run_dir=home / "run", say=lambda line: None)
    assert ended(home) == ("failed", "failed")
    (home / "go").unlink()
    (home / "fail").unlink()
    (home / "run/under-way").unlink()
    process = start(home)
    with pytest.raises(RunError, match="is in use by process"):
        run_recipe(recipe, recipe_dir=home, run_dir=home / "run", say=lambda line: None)
    assert not (home / "run" / EXIT_REASON).exists(), "the refused start says nothing for the other"
    process.kill()
    process.communicate()
    assert not (home / "run" / EXIT_REASON).exists()
