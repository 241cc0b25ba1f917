"""Made-up tasks for the tests of conditions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from limbeck.config.parts.conditions import PrepareConditionsStageOptions
from limbeck.data.conditions.build import build_conditions
from limbeck.data.conditions.store import ConditionSet
from limbeck.models.loading import load_tokenizer, resolve_source

TOKENIZER = resolve_source("builtin:code-2m")
COLOURS = ("red", "green", "blue", "white", "black", "brown")


def write_rows(path: Path, word: str, count: int = 120) -> str:
    """Questions with answers, of two kinds."""
    rows = [
        {
            "question": f"What {COLOURS[i % 6]} thing is number {i} of the {word}?",
            "answer": f"It is {word} {i * 7}.",
            "level": "hard" if i % 3 else "easy",
        }
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def rows(folder: Path, word: str, *, count: int = 120, **more: Any) -> dict[str, Any]:
    """A source of rows."""
    path = write_rows(folder / f"{word}.jsonl", word, count)
    source = {"kind": "text", "path": path, "documents": "row"}
    return {"name": word, "source": source, "prompt": "question", "answer": "answer", **more}


def options(sources: list[dict[str, Any]], **more: Any) -> PrepareConditionsStageOptions:
    """Options with small numbers."""
    given = {"tokenizer": "builtin:code-2m", "examples": 40, "test_examples": 10, "min_examples": 8, "sequence": 32}
    return PrepareConditionsStageOptions.model_validate({"sources": sources, **given, **more})


def build(folder: Path, sources: list[dict[str, Any]], *, out: str = "conditions", said: list[str] | None = None, **more: Any) -> ConditionSet:
    """The conditions of some options."""
    say = None if said is None else said.append
    return build_conditions(options(sources, **more), folder / out, tokenizer=TOKENIZER, base_dir=folder, progress=say)


def decoded(made: ConditionSet) -> dict[tuple[int, int], list[tuple[str, str]]]:
    """Prompts and answers by condition and side, read from the files alone."""
    tokenizer = load_tokenizer(str(made.tokenizer))
    found: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for start, prompt_end, end, condition, side in made.examples_E5.tolist():
        prompt, answer = (tokenizer.decode(made.tokens[a:b], skip_special_tokens=True) for a, b in ((start, prompt_end), (prompt_end, end)))
        found.setdefault((condition, side), []).append((prompt, answer))
    return found
