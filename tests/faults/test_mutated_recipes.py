"""Shipped recipes with faults put in: every one either loads, and is then good for all that is done without torch, or ends in a
`RecipeError` whose lines have a place."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from limbeck.cli.app import app
from limbeck.config.explain import explain
from limbeck.config.load import load_recipe, resolved, shipped_recipes
from limbeck.config.native import native_exports
from limbeck.config.recipe import Recipe
from limbeck.config.summary import summarise
from limbeck.errors import LimbeckError, RecipeError

NUMBER = 500
PLACE = re.compile(r".*:\d+:\d+$")
RAW = [
    b"\t",
    b"\x00",
    b"\xff",
    b"\xe2\x80\xa8",
    b"\xf0\x9f\x92\xa7",
    b"{",
    b"]",
    b": ",
    b"- ",
    b"&a ",
    b"*a",
    b"!!python/name:os.system ",
    b"%",
    b"'",
    b'"',
    b"---\n",
    b"\n",
]
WRONG = [
    None,
    True,
    -1,
    0,
    1e-3,
    10**400,
    2**70,
    float("inf"),
    "",
    "yes",
    "Ünïcödé 🜂",
    "9" * 5000,
    [],
    {},
    [[[[]]]],
    {"kind": "nothing"},
    {"from": "nowhere"},
    "2024-01-01",
    "${env:NO_SUCH_VARIABLE}",
    "${x}",
    ["a", None, 3],
]

Slot = tuple[Any, Any]
"""A container and the key or index of one value in it."""


def slots(tree: Any) -> Iterator[Slot]:
    """Every place of a tree that holds a value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from slots(value)


def delete(rng: random.Random, tree: Any) -> None:
    holder, key = rng.choice(list(slots(tree)))
    del holder[key]


def rename(rng: random.Random, tree: Any) -> None:
    holder, key = rng.choice([slot for slot in slots(tree) if isinstance(slot[0], dict)])
    letters = list(str(key))
    letters[rng.randrange(len(letters))] = rng.choice(["", "x", "_", "é", ".", "0"])
    holder["".join(letters)] = holder.pop(key)


def wrong_type(rng: random.Random, tree: Any) -> None:
    holder, key = rng.choice(list(slots(tree)))
    holder[key] = rng.choice(WRONG)


def swap(rng: random.Random, tree: Any) -> None:
    (one, a), (two, b) = rng.sample(list(slots(tree)), 2)
    try:
        one[a], two[b] = two[b], one[a]
    except (KeyError, IndexError):
        return
    if any(holder is value for holder in (one, two) for value in (one.get(a) if isinstance(one, dict) else None,)):
        delete(rng, tree)


def nest(rng: random.Random, tree: Any) -> None:
    holder, key = rng.choice(list(slots(tree)))
    for _ in range(rng.choice([1, 2, 60])):
        holder[key] = rng.choice([[holder[key]], {"kind": holder[key]}, {"from": holder[key]}])


def reference(rng: random.Random, tree: Any) -> None:
    stages = tree["stages"]
    stages[rng.choice(list(stages))]["from"] = rng.choice([*stages, "nowhere", "", 3])


def truncate(rng: random.Random, text: bytes) -> bytes:
    return text[: rng.randrange(len(text))]


def insert(rng: random.Random, text: bytes) -> bytes:
    at = rng.randrange(len(text))
    return text[:at] + rng.choice(RAW) * rng.choice([1, 1, 3]) + text[at:]


def duplicate_line(rng: random.Random, text: bytes) -> bytes:
    lines = text.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    return b"".join([*lines[: at + 1], lines[at], *lines[at + 1 :]])


def indent(rng: random.Random, text: bytes) -> bytes:
    lines = text.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    lines[at] = rng.choice([b" ", b"\t", b"   "]) + lines[at]
    return b"".join(lines)


IN_TREE: list[Callable[[random.Random, Any], None]] = [delete, rename, wrong_type, nest, reference, swap]
IN_TEXT: list[Callable[[random.Random, bytes], bytes]] = [truncate, insert, duplicate_line, indent]


def mutated(seed: int) -> bytes:
    """A shipped recipe with one to three faults in it."""
    rng = random.Random(seed)
    text = shipped_recipes()[rng.choice(sorted(shipped_recipes()))].read_bytes()
    mutations = rng.choices([*IN_TREE, *IN_TEXT], k=rng.choice([1, 1, 2, 3]))
    tree = yaml.safe_load(text)
    for mutate in mutations:
        if mutate in IN_TREE and isinstance(tree.get("stages"), dict) and tree["stages"]:
            try:
                mutate(rng, tree)  # type: ignore[arg-type]
            except (TypeError, AttributeError, KeyError, RecursionError):
                continue  # an earlier fault has left nothing for this one to spoil, or a tree that holds itself
            text = yaml.safe_dump(tree, allow_unicode=True, sort_keys=False).encode()
    for mutate in mutations:
        if mutate in IN_TEXT and text:
            text = mutate(rng, text)  # type: ignore[arg-type]
    return text


def test_mutated_recipes_load_or_are_told_what_is_wrong_and_where(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    refused = 0
    named: set[str] = set()
    for seed in range(NUMBER):
        path.write_bytes(mutated(seed))
        try:
            recipe = load_recipe(path)
            # What `check` does before it needs torch, and what a run directory keeps and reads again.
            assert recipe.name in summarise(recipe)
            native_exports(recipe)
            assert resolved(Recipe.model_validate(resolved(recipe))) == resolved(recipe), f"seed {seed}"
        except RecipeError as error:
            refused += 1
            assert error.problems, f"seed {seed}: an error without a problem"
            for problem in error.problems:
                assert PLACE.match(problem.where), f"seed {seed}: no place in {problem}"
                assert 10 < len(problem.message) < 700 and "\n" not in problem.message, f"seed {seed}: {problem}"
                assert "Input should" not in problem.message and "validation error" not in problem.message, (
                    f"seed {seed}: {problem}"
                )
            named |= {problem.path for problem in error.problems}
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__} escaped: {error}") from error
    assert NUMBER / 2 < refused < 0.95 * NUMBER, "the mutations are too tame, or too wild, to show anything"
    for field in sorted(named)[::10]:  # all would take as long as the rest of the test
        try:
            assert explain(field)
        except LimbeckError as error:
            assert "limbeck ls" in str(error), field


STAGE = "stages:\n  a:\n    kind: evaluate\n    from: {}\n"
FAULTS = {
    "wrong type": (
        "extends: hybrid\nname: x\nstages: {align: {loop: {tokens: many}}}",
        "align.loop.tokens: must be a positive whole number",
    ),
    "unknown key": ("extends: hybrid\nname: x\nstages: {align: {lop: 1}}", "unknown key, did you mean 'loop'"),
    "missing stage": ("name: x\n" + STAGE.format("b"), "no stage named 'b'"),
    "cycle": ("name: x\n" + STAGE.format("b") + "  b: {kind: evaluate, from: a}\n", "in a circle: a -> b -> a"),
    "duplicate key": ("name: x\nname: y\n" + STAGE.format("a"), "stands twice, first at"),
    "syntax": ("name: [x\n", "YAML: expected ',' or ']'"),
    "empty": ("", "is empty"),
    "missing file": (None, "no such file"),
}


@pytest.mark.parametrize("verb", ["check", "run", "prepare"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_command_line_ends_with_code_2_and_no_traceback(fault: str, verb: str, tmp_path: Path) -> None:
    text, words = FAULTS[fault]
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    result = CliRunner().invoke(app, [verb, str(path)])
    assert result.exit_code == 2, result.output
    assert words in result.stderr and "Traceback" not in result.output
    assert "recipe.yaml" in result.stderr
    assert not (tmp_path / "runs").exists()
