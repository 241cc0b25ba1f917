"""The page docs/evaluate.md: what it runs runs, on the files that it shows, and its other commands are understood."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
import typer

from harness_cases import TOKENIZER
from limbeck.cli.app import app
from pages import Page

PAGE = Page("evaluate.md")
VERBS: click.Group = typer.main.get_command(app)  # type: ignore[assignment]


def test_what_the_page_runs_runs_on_the_files_that_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'limbeck[lm-eval]'")
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "next_word.yaml").write_text(*(block.code for block in PAGE.blocks("yaml")))
    (tmp_path / "tasks" / "next_word.jsonl").write_text(*(block.code for block in PAGE.blocks("json")))
    assert len(PAGE.commands("console")) == 2 and Path(TOKENIZER).name == "code-2m"
    for documents, words in zip((3, 2), PAGE.commands("console"), strict=True):
        VERBS.main(words, standalone_mode=False)
        written = json.loads((tmp_path / "runs/evaluate/builtin-code-2m/evaluation/lm_eval.json").read_text())
        assert written["tasks"]["next_word"]["documents"] == documents
        assert written["tasks"]["next_word"]["metrics"]["acc,none"]["values"]["model"] == 1
    for key in (*written, *written["tasks"]["next_word"], *written["models"]["model"]):
        assert f"`{key}" in PAGE.text, key


@pytest.mark.parametrize("words", PAGE.commands("bash"), ids=" ".join)
def test_every_command_of_the_page_is_understood(words: list[str]) -> None:
    verb = VERBS.commands[words[0]]
    context = verb.make_context(words[0], list(words[1:]), resilient_parsing=False)
    assert context.args == (words[1:] if words[0] == "lm_eval" else [])
