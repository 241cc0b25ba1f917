"""What can be typed next in a ``path.to.key=value`` word, for shells: keys of the schema, along what the recipe has written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from limbeck.config.base import From
from limbeck.config.explain import default_of, summary
from limbeck.config.fields import (
    DictShape,
    ListShape,
    ModelShape,
    PartShape,
    ScalarShape,
    Shapes,
    field_shapes,
    fields_of,
    flat,
    shapes,
)
from limbeck.config.load import find_recipe, shipped_tree
from limbeck.config.recipe import Recipe

Candidate = tuple[str, str]
"""A word, and a line about it."""
Below = dict[str, tuple[Shapes, Any, str, FieldInfo | None]]
"""Key -> what it accepts, what the recipe says there (None: nothing), a line about it, and its field if it is one."""


def override_candidates(recipe: str, word: str) -> list[Candidate]:
    """Words that begin with ``word``: branches end in ``.``, settings in ``=``, and behind that stand their values.

    There is never a lone branch or a lone ``key=``: a shell takes a lone candidate for a finished word and puts a space behind it.
    """
    data = shipped_tree(find_recipe(recipe)).plain()
    key, equals, value = word.partition("=")
    if equals:
        found = _at(data, key.split("."))
        return [] if found is None else [(f"{key}={v}", "") for v in _values(*found) if v.startswith(value)]
    candidates = list(_keys(data, word))
    if len(candidates) != 1:
        return candidates
    lone, text = candidates[0]
    if lone.endswith("."):
        return override_candidates(recipe, lone)
    found = _at(data, lone[:-1].split("."))
    return [(lone, text), *((f"{lone}{v}", "") for v in (_values(*found) if found else []))]


def stage_candidates(recipe: str) -> list[Candidate]:
    """The stages of a recipe."""
    stages = shipped_tree(find_recipe(recipe)).plain().get("stages")
    return [(name, _kind(stage)) for name, stage in stages.items()] if isinstance(stages, dict) else []


def _kind(stage: Any) -> str:
    return str(stage.get("kind", "train")) if isinstance(stage, dict) else ""


def _keys(data: Any, word: str) -> Iterator[Candidate]:
    *above, last = word.split(".")
    if not above:
        for name, line in ((name, f"stage ({_kind(stage)})") for name, stage in _stages(data).items()):
            if name.startswith(last):
                yield f"{name}.", line
    for name, (found, there, line, _) in _below(*_walk(data, above)).items():
        if not name.startswith(last):
            continue
        prefix = ".".join((*above, name))
        branch = bool(_below(found, there))
        if branch:
            yield f"{prefix}.", line
        if not branch or any(isinstance(shape, ScalarShape) for shape in flat(found)):
            yield f"{prefix}=", line


def _stages(data: Any) -> dict[str, Any]:
    stages = data.get("stages")
    return stages if isinstance(stages, dict) else {}


def _at(data: Any, path: list[str]) -> tuple[Shapes, Any, FieldInfo | None] | None:
    """What stands at the end of a path."""
    entry = _below(*_walk(data, path[:-1])).get(path[-1])
    return None if entry is None else (entry[0], entry[1], entry[3])


def _walk(data: Any, path: list[str]) -> tuple[Shapes, Any]:
    """Down a path; a stage's name may stand without ``stages.`` before it.  Nothing is below a path that leads nowhere."""
    found: Shapes = shapes(Recipe)
    if path and path[0] in _stages(data):
        path = ["stages", *path]
    for key in path:
        entry = _below(found, data).get(key)
        if entry is None:
            return Shapes(()), None
        found, data = entry[0], entry[1]
    return found, data


def _below(found: Shapes, data: Any) -> Below:
    options: Below = {}
    for shape in flat(found):
        cls = None
        if isinstance(shape, ModelShape) and shape.cls is not From:
            cls = shape.cls
        elif isinstance(shape, PartShape):
            cls = shape.options_of({} if data is None else data)
        elif isinstance(shape, DictShape) and isinstance(data, dict):
            options |= {str(key): (shapes(shape.value), value, "", None) for key, value in data.items()}
        elif isinstance(shape, ListShape) and isinstance(data, list):
            options |= {str(i): (shapes(shape.item), value, "", None) for i, value in enumerate(data)}
        for key, info in fields_of(cls).items() if cls is not None else ():
            value = data.get(key) if isinstance(data, dict) else None
            line = f"{summary(cls)}" if key == "kind" and cls is not None else (info.description or "").split(". ")[0]
            options.setdefault(key, (field_shapes(info), value, " ".join(line.split()), info))
    return options


def _values(found: Shapes, there: Any, info: FieldInfo | None) -> list[str]:
    """Words that may stand behind ``=``: all, where there are few; else what is written, or the default."""
    words: list[str] = []
    for shape in flat(found):
        if isinstance(shape, PartShape):
            words += list(shape.registry)
        elif isinstance(shape, ScalarShape):
            words += ["true", "false"] if shape.type is bool else [_written(choice) for choice in shape.choices]
    if not words:
        default = default_of(info) if info is not None and not info.is_required() else None
        value = there if there is not None else default
        words = [_written(value)] if isinstance(value, str | int | float) else []
    return [*words, "null"] if found.nullable else words


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
