"""The page docs/agentic.md: its code runs, its links and names are there, and its recipes and commands are ones that exist."""

from __future__ import annotations

import json
import re
import runpy
import sys
from typing import get_args

import pytest
import yaml

import limbeck.agentic as agentic
from limbeck.config.load import load_recipe, load_text, shipped_recipes
from limbeck.data.trajectories.trajectory import Reason
from pages import ROOT, Page

PAGE = Page("agentic.md")


def test_python_of_the_page_runs() -> None:
    names: dict[str, object] = {"__name__": "page"}
    for block in PAGE.blocks("python"):
        exec(PAGE.compiled(block), names)
    metrics = names["metrics"]
    assert isinstance(metrics, dict) and metrics["loss"] < 1e-6 and metrics["grad_norm"] < 1e-3


def test_commands_of_the_page_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert PAGE.commands("console")
    for words in PAGE.commands("console"):
        monkeypatch.setattr(sys, "argv", ["limbeck", *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("limbeck", run_name="__main__", alter_sys=True)
        assert end.value.code in (0, None), words
    assert "evaluate_agent" in capsys.readouterr().out


def test_what_the_page_says_to_put_into_a_recipe_is_taken() -> None:
    main = load_recipe("agentic_lora").stages["main"].model_dump(mode="json", by_alias=True, exclude_unset=True)
    for block in PAGE.blocks("yaml"):
        stage = {**main, "student": {"base": "builtin:code-2m"}, "data": {"source": "stdlib", "tokenizer": "builtin:code-2m"}, **yaml.safe_load(block.code)}
        load_text(json.dumps({"name": "page", "stages": {"main": stage}}), label="docs/agentic.md")


def test_recipes_and_stages_that_the_page_names_exist() -> None:
    text = PAGE.text
    named = {word for word in re.findall(r"\bagentic_lora\w*", text)}
    assert named <= set(shipped_recipes()) and "agentic_lora_tiny" in named
    stages = load_recipe("agentic_lora").stages
    assert set(re.findall(r"--stage (\w+)", text)) <= set(stages)
    assert all(f"`{name}`" in text for name in ("warmup", "main", "anneal", "static", "static_anneal"))
    assert set(re.findall(r"runs/agentic-lora/(\w+)", text)) <= set(stages) and load_recipe("agentic_lora").name == "agentic-lora"
    assert {"unanswered call", "arguments not JSON", "truncated JSON", "special token in text"} <= set(get_args(Reason))


def test_the_page_lists_every_public_name_and_is_short() -> None:
    text = PAGE.text
    assert [name for name in agentic.__all__ if f"`{name}" not in text] == []
    assert text.count("\n") < 180
    assert all((ROOT / "tests" / "unit" / name).exists() for name in ("test_gradient_flow.py", "test_zero_init.py"))
