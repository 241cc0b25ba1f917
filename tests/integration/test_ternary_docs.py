"""The page docs/ternary.md: its commands run or are understood, its flags and settings exist, its links are there."""

from __future__ import annotations

import re

import click
import pytest
import typer

from limbeck.cli.app import app
from limbeck.config.load import load_recipe
from limbeck.ternary import DistillTernary
from pages import Page

PAGE = Page("ternary.md")
TEXT = PAGE.text
VERBS: click.Group = typer.main.get_command(app)  # type: ignore[assignment]


@pytest.mark.parametrize("words", PAGE.commands("console"), ids=" ".join)
def test_what_the_page_runs_runs(words: list[str]) -> None:
    VERBS.main(words, standalone_mode=False)


@pytest.mark.parametrize("words", PAGE.commands("bash"), ids=lambda words: words[0])
def test_what_the_page_would_start_is_understood(words: list[str]) -> None:
    verb = VERBS.commands[words[0]]
    verb.make_context(words[0], list(words[1:]))


def test_every_flag_of_the_verb_stands_in_the_table_and_the_other_way_round() -> None:
    flags = {option for p in VERBS.commands["distill-ternary"].params for option in p.opts if option.startswith("--")}
    table = {flag for line in TEXT.splitlines() if line.startswith("| `--") for flag in re.findall(r"--[a-z-]+", line.split("|")[1])}
    assert flags - {"--fresh", "--log-interval", "--help", "--checkpoint-interval"} == table


def test_the_defaults_of_the_table_are_those_of_the_verb_and_of_python() -> None:
    shown = {p.opts[0].removeprefix("--").replace("-", "_"): p.default for p in VERBS.commands["distill-ternary"].params if p.opts[0].startswith("--")}
    plain = DistillTernary(teacher_endpoint="")
    for name, value in shown.items():
        if name not in ("fresh", "parallel", "data"):
            assert getattr(plain, name) == value, name


def test_settings_that_the_page_names_exist() -> None:
    stage = load_recipe("ternary").stages["distil"]
    for path in set(re.findall(r"`((?:teacher|loop|optim|student|data)\.[a-z_.0-9]+)`", TEXT)):
        found = stage
        for word in path.split("."):
            found = found[int(word)] if word.isdigit() else getattr(found, word)
