"""docs/plan.md: its worked examples are what the command prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from limbeck.cli.app import app

PAGE = Path(__file__).parents[2] / "docs" / "plan.md"
EXAMPLES = re.findall(r"```console\n\$ limbeck (plan [^\n]+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_there_are_three_examples_and_a_link_from_the_readme() -> None:
    assert len(EXAMPLES) == 3
    assert "docs/plan.md" in (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("words", "printed"), EXAMPLES)
def test_a_worked_example_prints_what_the_page_says(words: str, printed: str) -> None:
    done = CliRunner().invoke(app, words.split())
    lines = [line.rstrip() for line in done.output.splitlines()]
    assert "\n".join(lines).strip() == printed.strip()
    assert done.exit_code == (0 if "verdict: fits" in printed else 1)


def test_every_device_and_option_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    helped = CliRunner().invoke(app, ["plan", "--help"], env={"COLUMNS": "200"}).output
    for option in re.findall(r"--[a-z-]+", helped):
        assert option in text or option == "--help", option
