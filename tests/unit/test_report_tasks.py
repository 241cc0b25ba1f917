"""Page and card on the tasks of lm-evaluation-harness and on the licence: what was measured, and under which reservations."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from limbeck.models.licence import licence_of
from limbeck.report.card import model_card
from limbeck.report.html import write_report
from limbeck.report.run import read_run

METRICS = {
    "acc,none": {"better": 1, "values": {"teacher": 0.5, "model": 0.75}, "stderr": {"teacher": 0.1, "model": 0.05}},
    "bits_per_byte,none": {"better": -1, "values": {"teacher": 1.5, "model": None}, "stderr": {}},
}
SETTINGS = {"limit": None, "fewshot": None, "chat_template": False, "dtype": "float32", "condition": [], "named": None}


def tasks_run(folder: Path, *, settings: dict[str, object] | None = None, made_from: dict[str, object] | None = None) -> Path:
    """A run directory whose one stage was trained and run on a task."""
    results = {
        "harness": "0.4.13", "source": "runs/x/distil", "against": "Qwen/<b>", "settings": {**SETTINGS, **(settings or {})},
        "models": {"teacher": {"parameters": 9}, "model": {"parameters": 3}},
        "tasks": {"arc|easy": {"documents": 12, "fewshot": 2, "metrics": METRICS}},
    }  # fmt: skip
    options = {"kind": "train", "student": {"base": "Qwen/Qwen3-0.6B"}}
    stage = {"kind": "train", "status": "finished", "seconds": 1.0, "options": options, "made_from": made_from or {}}
    (folder / "distil" / "evaluation").mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps({"name": "x", "stages": {"distil": options}}))
    (folder / "distil" / "stage.json").write_text(json.dumps(stage))
    (folder / "distil" / "evaluation" / "lm_eval.json").write_text(json.dumps(results))
    return folder


def test_page_and_card_show_every_task_with_its_error_and_the_best(tmp_path: Path) -> None:
    page = write_report(tasks_run(tmp_path)).read_text(encoding="utf-8")
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert "arc|easy: 12 documents, 2 shots" in words and "acc 0.5 ± 0.1 0.75 ± 0.05" in words and "bits_per_byte 1.5 –" in words
    assert "<td class=best>0.75 ± 0.05</td>" in page and "Qwen/&lt;b&gt;" in page and "Only" not in words
    card = model_card(read_run(tmp_path))
    assert "| arc\\|easy: 12 documents, 2 shots: acc | 0.5 ± 0.1 | **0.75 ± 0.05** |" in card
    assert "lm-evaluation-harness 0.4.13" in card


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"limit": 3.0}, "Only 3 documents of each task"),
        ({"limit": 0.25}, "Only 25.0% of each task"),
        ({"chat_template": True}, "chat template"),
        ({"condition": ["a", "b"]}, "made from 2 texts"),
        ({"named": "reverse"}, "made from the condition reverse"),
    ],
)
def test_what_makes_numbers_other_ones_is_said(tmp_path: Path, settings: dict[str, object], said: str) -> None:
    assert said in write_report(tasks_run(tmp_path, settings=settings)).read_text(encoding="utf-8")


def test_the_card_carries_the_licence_of_the_base(tmp_path: Path) -> None:
    terms = {"license": "other", "license_name": "qwen: research", "license_link": "https://example.org/LICENSE"}
    card = model_card(read_run(tasks_run(tmp_path, made_from={"licence": terms})))
    assert {**terms, "base_model": "Qwen/Qwen3-0.6B"}.items() <= yaml.safe_load(card.split("---")[1]).items()
    assert "under the base's licence. The base's own card says: other qwen: research https://example.org/LICENSE." in card


def test_the_card_of_a_hybrid_says_how_tools_that_do_not_know_it_come_to_it(tmp_path: Path) -> None:
    run = read_run(tasks_run(tmp_path))
    assert "lm_eval --model" not in model_card(run)
    run.recipe["stages"]["distil"]["student"]["surgery"] = [{"kind": "hybridize"}]
    assert "python -m limbeck lm_eval --model hf" in model_card(run) and "lm_eval --model" not in model_card(run, stock=True)


def test_an_unknown_licence_is_no_licence(tmp_path: Path) -> None:
    card = model_card(read_run(tasks_run(tmp_path)))
    assert "license" not in yaml.safe_load(card.split("---")[1])
    assert "see the card of Qwen/Qwen3-0.6B" in card


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# A\n", {"license": "mit"}),
        ("---\nlicense: other\nlicense_link: LICENSE\n---", {"license": "other", "license_link": "LICENSE"}),
        ("# A\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("---\nlicense: [mit]\n---\n", {}),
        ("---\n{: broken\n---\n", {}),
        ("", {}),
    ],
)
def test_a_licence_is_read_from_the_head_of_a_card_alone(tmp_path: Path, text: str, found: dict[str, str]) -> None:
    (tmp_path / "README.md").write_text(text)
    assert licence_of(str(tmp_path)) == found


def test_without_a_card_or_a_network_there_is_none(tmp_path: Path) -> None:
    assert licence_of(str(tmp_path)) == {} and licence_of("nobody/nothing") == {}
