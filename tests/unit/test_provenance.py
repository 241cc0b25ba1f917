"""What a start writes down of itself: the commit only where the code is that of a checkout, and no secrets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from limbeck.stages.provenance import code_commit, surroundings


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, "-C", str(folder), *words], check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_the_tracked_code_and_says_where_it_was_changed(tmp_path: Path) -> None:
    package, installed = tmp_path / "src", tmp_path / "venv"
    for folder in (package, installed):
        folder.mkdir()
        (folder / "__init__.py").write_text("")
    assert code_commit(package) is None, "no checkout"
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "src")
    git(tmp_path, "commit", "-qm", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert code_commit(package) == commit
    assert code_commit(installed) is None, "a package below somebody's repository is none of its files"
    (package / "__init__.py").write_text("changed = True\n")
    assert code_commit(package) == f"{commit}+changes"


def test_a_start_is_recorded_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["limbeck", "run", "my recipe.yaml", "s.teacher.token=hush-hush", "a=b"])
    facts = surroundings(torch.device("cpu"))
    assert facts["command"] == "limbeck run 'my recipe.yaml' 's.teacher.token=***' a=b"
    assert facts["device"].startswith("CPU, ") and facts["versions"]["torch"].startswith("2.")
