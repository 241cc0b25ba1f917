"""The page docs/python.md: its Python runs from top to bottom, its commands parse, and every verb stands beside its function."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

import limbeck
from limbeck.api import NAMES
from limbeck.cli.app import app
from pages import Page

PAGE = Page("python.md")


def test_python_of_the_page_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # The page is for a machine that has these unset, and keeps to its own folder.
    for name in ("LIMBECK_TEACH_TOKEN", "LIMBECK_API_KEY", "TEACHER_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    names: dict[str, Any] = {"__name__": "page"}
    for block in PAGE.blocks("python"):
        exec(PAGE.compiled(block), names)
    assert (
        names["recipe"].stages["distil"].loop.tokens == 1000 and "softmax kept" in names["summary"] and names["unchecked"] == []
    )
    assert names["plan"].fits and [part.name for part in names["plan"].parts] == list(names["recipe"].stages)
    assert [stage.name for stage in names["run"].stages] == ["align", "distil", "evaluate"] and names["page"].is_file()
    assert names["comparison"].differences == [("align.optim.groups.0.lr", ("0.003", "0.01"))]
    assert names["models"]["data"][0]["id"] == "student" and names["found"].model == "builtin:code-2m"
    assert (names["final"] / "model" / "model.safetensors").is_file()
    assert names["norm"] > 0 and names["nearest"].folder == Path("both") and 0 < names["nearest"].cosine < 1
    assert names["machine"].facts and float(names["metrics"]["kl"][0]) > 0
    assert sum(p.grad.square().sum() for p in names["model"].parameters() if p.grad is not None) > 0
    assert {"my.yaml", "recipe.schema.json", "compare.html", "runs", "student"} <= {path.name for path in tmp_path.iterdir()}


def test_commands_of_the_page_parse() -> None:
    root: Any = typer.main.get_command(app)
    lines = PAGE.commands("bash")
    assert lines
    for words in lines:
        known = words[: words.index(">")] if ">" in words else words
        group, verb, *rest = [root, *known] if known[0] != "adapters" else [root.commands["adapters"], *known[1:]]
        with group.commands[verb].make_context(verb, list(rest)):
            pass


def test_every_verb_and_every_function_is_on_the_page() -> None:
    root: Any = typer.main.get_command(app)
    assert [verb for verb in root.commands if f"limbeck {verb}" not in PAGE.text and f"limbeck.{verb}" not in PAGE.text] == []
    named = set(re.findall(r"\blimbeck\.(\w+)", PAGE.text))
    assert [name for name in NAMES if name not in named] == []
    assert [name for name in named if not hasattr(limbeck, name)] == []


def test_the_page_is_short() -> None:
    assert PAGE.text.count("\n") < 260
