"""The teacher that comes with the package: without recall, no experiment on it would mean anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from limbeck.config.load import load_recipe
from limbeck.config.parts.stages import RecallOptions
from limbeck.data.tokenizer import ordinary_ids
from limbeck.evaluation.recall import recall
from limbeck.evaluation.retrieval import retrieval_layers
from limbeck.models.loading import load_model, load_tokenizer, resolve_source

FOLDER = Path(resolve_source("builtin:code-2m"))
WORDS = 512
"""Ids that its recall documents used."""


@pytest.fixture(scope="module")
def teacher() -> tuple[Any, Any]:
    return load_model(str(FOLDER)), load_tokenizer(str(FOLDER))


def test_it_is_small_and_shaped_to_catch_wrong_assumptions(teacher: tuple[Any, Any]) -> None:
    model, _ = teacher
    assert 1.5e6 <= sum(p.numel() for p in model.parameters()) <= 2.5e6
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) <= 8e6
    assert model.config.head_dim != model.config.hidden_size // model.config.num_attention_heads
    assert json.loads((FOLDER / "config.json").read_text())["dtype"] == "bfloat16"


def test_it_recalls_at_half_its_context(teacher: tuple[Any, Any]) -> None:
    model, tokenizer = teacher
    options = RecallOptions(tasks=("repeat",), distances=(256,), rows=4, vocabulary=WORDS)
    assert recall(model, options, ordinary_ids(tokenizer))[0]["accuracy"] >= 0.9


def test_two_layers_retrieve_and_the_shipped_recipes_keep_one_of_them(teacher: tuple[Any, Any]) -> None:
    model, tokenizer = teacher
    retrieving = set(retrieval_layers(model, ordinary_ids(tokenizer)[:WORDS], distance=128))
    assert len(retrieving) >= 2, "with one such layer, which layers to keep would be no question"
    for recipe in ("quickstart", "hybrid"):
        assert retrieving & set(load_recipe(recipe).stages["distil"].student.keep)


def test_its_card_says_where_it_comes_from() -> None:
    card = (FOLDER / "README.md").read_text()
    assert "Apache-2.0" in card and "standard library" in card.replace("\n", " ")
    recipe = json.loads((FOLDER / "recipe.json").read_text())
    assert recipe["stages"]["pretrain"]["student"]["config"]["model_type"] == "qwen3"
    curve = [json.loads(line) for line in (FOLDER / "metrics.jsonl").read_text().splitlines()]
    assert any("validation/loss" in row for row in curve)
