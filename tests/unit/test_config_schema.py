"""The schema as people and editors see it: ``init``, ``explain``, ``ls``, JSON schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from limbeck.config.explain import explain, index, json_schema, kinds, known
from limbeck.config.load import load_recipe, load_text, shipped_recipes
from limbeck.config.template import template
from limbeck.errors import LimbeckError
from limbeck.registry import REGISTRIES

OURS = {
    kind: [name for name in registry if registry.options(name).__module__.startswith("limbeck.")]
    for kind, registry in REGISTRIES.items()
}
"""The built-in parts: other tests may have registered some of their own."""


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_an_initialised_recipe_loads_to_the_one_it_was_made_from(name: str) -> None:
    assert load_text(template(name)) == load_recipe(name)


def test_an_initialised_recipe_explains_every_field_of_what_it_uses() -> None:
    text = " ".join(line.strip().removeprefix("# ").strip() for line in template("hybrid").splitlines())
    used = (
        "train",
        "hybridize",
        "gated_deltanet",
        "stdlib",
        "recall",
        "self",
        "local",
        "kl",
        "ce",
        "attention_alignment",
        "evaluate",
        "export",
    )
    unused = {part for registry in REGISTRIES.values() for part in registry} - set(used)
    for entry in index():
        if not unused & set(entry.path) and entry.path[-2:] != ("tokenizer", "vocabulary") and "tokenizer" not in entry.path:
            assert f"{entry.key}:" in text, entry.path
    for words in ("Global gradient norm; null for no clipping.", "Rotate the linear q and k", "rows: 64", "clip: 1.0"):
        assert words in text


def test_every_field_has_help() -> None:
    ours = [entry for entry in index() if entry.cls.__module__.startswith("limbeck.")]
    bare = {".".join(entry.path) for entry in ours if not entry.info.description and entry.key != "kind"}
    assert not bare


def test_an_unknown_template_names_the_shipped_ones() -> None:
    with pytest.raises(LimbeckError, match="did you mean 'hybrid'"):
        template("hybird")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("swa", "Tokens a position sees"),
        ("mixer.swa", "sinks: a whole number at least 0; default 4"),
        ("loop.tokens", "stages.train.loop.tokens"),
        ("stages.align.optim.groups.0.lr", "Peak learning rate."),
        ("optim.clip", "a number above 0 or null; default 1.0"),
        ("hybrid", "align      train"),
    ],
)
def test_explain_finds_parts_fields_and_recipes(name: str, words: str) -> None:
    assert words in explain(name)


@pytest.mark.parametrize("name", ["nonsense", "", ".", "loop.nonsense"])
def test_explain_of_nothing_is_told(name: str) -> None:
    with pytest.raises(LimbeckError, match="nothing is called"):
        explain(name)


def test_ls_lists_every_kind_with_a_line_each() -> None:
    assert set(kinds()) >= {"recipes", "mixers", "teachers", "objectives", "surgeries", "sources", "stages"}
    for kind, word in kinds().items():
        lines = dict(known(kind))
        assert all(lines[name] for name in (shipped_recipes() if kind == "recipes" else OURS[word]))
    with pytest.raises(LimbeckError, match="did you mean 'mixers'"):
        known("mixer")


def references_of(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for value in schema.values():
            yield from references_of(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from references_of(value)


def test_the_json_schema_tells_parts_apart_by_kind_and_every_reference_resolves() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    definitions = schema["$defs"]
    assert all(ref.removeprefix("#/$defs/") in definitions for ref in references_of(schema))
    parts, names = schema["properties"]["stages"]["additionalProperties"]["anyOf"]
    assert set(parts["discriminator"]["mapping"]) == set(names["enum"]) == set(REGISTRIES["stage"])
    assert {ref["$ref"] for ref in parts["oneOf"]} == set(parts["discriminator"]["mapping"].values())
    for kind, names in OURS.items():
        for name in names:
            definition = definitions[REGISTRIES[kind].options(name).__name__]
            assert definition["properties"]["kind"]["const"] == name
            assert definition["additionalProperties"] is False
    # A stage that names no kind is a train stage: only there may `kind` be missing.
    assert "kind" not in definitions["TrainStageOptions"]["required"]
    assert "kind" in definitions["SlidingWindowOptions"]["required"]
    assert definitions["TrainStageOptions"]["properties"]["loop"]["description"] == "Budget, batch and retention."
    assert {"type": "number", "minimum": 1} in definitions["LoopOptions"]["properties"]["batch_tokens"]["anyOf"]
