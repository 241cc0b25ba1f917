"""The command line: verbs, exit codes, and what is not imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from limbeck.cli.app import app
from limbeck.config.load import load_recipe

VERBS = [
    "quickstart",
    "prepare",
    "run",
    "check",
    "plan",
    "init",
    "ls",
    "explain",
    "schema",
    "evaluate",
    "generate",
    "export",
    "teach",
    "signals",
    "report",
    "compare",
    "doctor",
]
LIGHT = """
import contextlib, io, sys
from limbeck.cli.app import app
for line in ("--help", "run --help", "check hybrid align.loop.tokens=1M", "check nothing", "plan --help", "plan hybrid",
             "plan agentic_lora --device h200 --gpus 8 --brief", "plan Qwen3-Coder-Next --json", "plan nothing", "init hybrid", "ls", "ls mixers",
             "schema", "explain swa"):
    out, words = io.StringIO(), line.split()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
        app(words, prog_name="limbeck")
    assert out.getvalue(), words
    heavy = {"torch", "transformers", "tokenizers", "numpy", "datasets", "safetensors"} & set(sys.modules)
    assert not heavy, (words, heavy)
"""
PAGES = """
import contextlib, io, json, sys, tempfile
from pathlib import Path
from limbeck.cli.app import app
with tempfile.TemporaryDirectory() as folder:
    for name in "ab":
        (Path(folder) / name / "s").mkdir(parents=True)
        options = {"kind": "train", "seed": ord(name)}
        (Path(folder) / name / "recipe.json").write_text(json.dumps({"name": name, "stages": {"s": options}}))
        (Path(folder) / name / "s" / "stage.json").write_text(json.dumps({"kind": "train", "status": "finished", "options": options}))
    for line in ("report {0}/a", "compare {0}/a {0}/b --out {0}/c.html"):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            app(line.format(folder).split(), prog_name="limbeck")
        assert ".html" in out.getvalue(), (line, out.getvalue())
        heavy = {"torch", "transformers", "tokenizers", "numpy", "datasets", "safetensors"} & set(sys.modules)
        assert not heavy, (line, heavy)
"""
runner = CliRunner()


def test_light_verbs_import_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_pages_of_runs_are_made_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_python_dash_m_is_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "limbeck", "check", "nothing"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no such file" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_it_does(verb: str) -> None:
    result = runner.invoke(app, [verb, "--help"])
    assert result.exit_code == 0 and f"Usage: limbeck {verb}" in runner.invoke(app, [verb, "--help"], prog_name="limbeck").output


def test_check_says_what_a_recipe_would_do() -> None:
    result = runner.invoke(app, ["check", "hybrid", "align.loop.tokens=81920"])
    assert result.exit_code == 0
    assert "81.92k tokens in 10 steps of 8,192" in result.output and "softmax kept in layers" in result.output


def test_init_prints_a_recipe_that_loads(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(runner.invoke(app, ["init", "hybrid"]).output)
    assert load_recipe(path) == load_recipe("hybrid")


def test_schema_is_json() -> None:
    assert json.loads(runner.invoke(app, ["schema"]).output)["properties"]["stages"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check", "nowhere.yaml"], "no such file"),
        (["check", "hybrid", "align.lop.tokens=3"], "did you mean 'loop'"),
        (["run", "nowhere.yaml"], "no such file"),
        (["plan", "nowhere.yaml"], "no such file"),
        (["prepare", "nowhere.yaml"], "no such file"),
        (["init", "nothing"], "no shipped recipe 'nothing'"),
        (["ls", "nothing"], "unknown kind 'nothing'"),
        (["explain", "nothing"], "nothing is called 'nothing'"),
        (["check"], "Missing argument"),
        (["chek"], "No such command"),
    ],
)
def test_errors_of_people_end_with_code_2_and_no_traceback(words: list[str], message: str) -> None:
    result = runner.invoke(app, words)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


def test_an_interruption_ends_with_a_clear_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("limbeck.config.explain.explain", interrupt)
    result = runner.invoke(app, ["explain", "swa"])
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].startswith("limbeck: interrupted")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(_: str) -> str:
        raise KeyError("ours")

    monkeypatch.setattr("limbeck.config.explain.explain", bug)
    assert isinstance(runner.invoke(app, ["explain", "swa"]).exception, KeyError)


def test_doctor_ends_with_a_verdict() -> None:
    pytest.importorskip("torch")
    result = runner.invoke(app, ["doctor"])
    assert result.output.splitlines()[-1].startswith("verdict: ")
    assert all(word in result.output for word in ("torch", "threads", "GiB free", "GFLOP/s", "flash-linear-attention"))
