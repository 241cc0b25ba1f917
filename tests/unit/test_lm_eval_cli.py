"""The doors to lm-evaluation-harness, without it: what they import, and what they say when it is not there."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from limbeck import packages
from limbeck.cli.app import app
from limbeck.evaluation.harness_table import harness_table

HELP = """
import contextlib, io, sys
from limbeck.cli.app import app
out = io.StringIO()
with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
    app(["evaluate", "--help"], prog_name="limbeck")
assert "--tasks" in out.getvalue()
heavy = {"torch", "transformers", "datasets", "lm_eval", "accelerate", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_imports_neither_torch_nor_the_harness() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("words", "who"), [(["evaluate", "m", "--tasks", "t"], "evaluate --tasks"), (["lm_eval", "--help"], "lm_eval")])
def test_a_harness_that_is_not_there_is_named_with_the_way_out(words: list[str], who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda package: None if package == "lm_eval" else object())
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and done.stderr == f"limbeck: `limbeck {who}` needs lm_eval: pip install 'limbeck[lm-eval]'\n"


@pytest.mark.parametrize("words", [["--limit", "3"], ["--apply-chat-template"], ["--batch-size", "2"], ["--condition", "a"], ["--dtype", "bfloat16"]])
def test_an_option_for_tasks_without_tasks_is_refused(words: list[str]) -> None:
    done = CliRunner().invoke(app, ["evaluate", "m", *words])
    assert done.exit_code == 2 and f"{words[0]}: goes with --tasks" in done.stderr


def test_the_table_shows_errors_and_what_is_best_where_one_is() -> None:
    metrics = {
        "acc,none": {"better": 1, "values": {"teacher": 0.5, "model": 0.25}, "stderr": {"teacher": 0.1, "model": None}},
        "bits_per_byte,none": {"better": -1, "values": {"teacher": 2.0, "model": 1.5}, "stderr": {}},
        "tie,strict": {"better": 1, "values": {"teacher": 1.0, "model": 1.0}, "stderr": {}},
        "odd,none": {"better": 0, "values": {"model": 3.0}, "stderr": {}},
    }
    table = harness_table({"models": {"teacher": {}, "model": {}}, "tasks": {"t": {"documents": 6, "fewshot": 2, "metrics": metrics}}})
    rows = [[f"*{cell}*" if getattr(cell, "style", "") == "bold" else str(cell) for cell in row] for row in zip(*(c.cells for c in table.columns), strict=True)]
    assert rows == [
        ["t: 6 documents, 2 shots", "", ""],
        ["  acc", "*0.5 ± 0.1*", "0.25"],
        ["  bits_per_byte", "2", "*1.5*"],
        ["  tie, strict", "1", "1"],
        ["  odd", "–", "3"],
    ]
