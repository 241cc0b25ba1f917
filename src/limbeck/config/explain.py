"""The schema in words: ``limbeck explain NAME``, ``limbeck ls KIND`` and the JSON schema for editors."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from limbeck.config.base import From
from limbeck.config.fields import (
    DictShape,
    ListShape,
    ModelShape,
    PartShape,
    Shapes,
    describe_all,
    field_shapes,
    fields_of,
    shapes,
)
from limbeck.config.load import load_recipe, shipped_recipes
from limbeck.config.plugins import load_entry_points
from limbeck.config.recipe import Recipe
from limbeck.errors import LimbeckError, did_you_mean
from limbeck.registry import REGISTRIES

_PLURALS = {"surgery": "surgeries"}


def kinds() -> dict[str, str]:
    """The words that ``limbeck ls`` takes -> the registry's own word (recipes are no registry)."""
    return {"recipes": "recipe"} | {_PLURALS.get(kind, f"{kind}s"): kind for kind in REGISTRIES}


def known(kind: str) -> list[tuple[str, str]]:
    """``(name, one line)`` of everything of a kind: ``recipes``, ``mixers``, ``teachers`` …"""
    load_entry_points()
    if kind not in kinds():
        raise LimbeckError(f"unknown kind {kind!r}{did_you_mean(kind, kinds()) or ';'} known: {', '.join(kinds())}")
    if kind == "recipes":
        return [(name, load_recipe(name).description) for name in shipped_recipes()]
    registry = REGISTRIES[kinds()[kind]]
    return [(name, summary(registry.options(name))) for name in registry]


def summary(cls: type[BaseModel]) -> str:
    """First sentence of a class's docstring."""
    return _flow(inspect.getdoc(cls) or "").split(". ")[0].rstrip(".")


def help_of(info: FieldInfo) -> str:
    """A field's docstring on one line."""
    return _flow(info.description or "")


def default_of(info: FieldInfo) -> Any:
    """A field's default as JSON values."""
    return to_jsonable_python(info.get_default(call_default_factory=True), by_alias=True)


def some(places: Iterable[str]) -> str:
    """The first few of the places where something stands, and how many more there are."""
    paths = list(dict.fromkeys(places))
    return ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")


def _flow(text: str) -> str:
    return " ".join(text.split())


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors; parts are told apart by ``kind``.

    ``json.dumps(limbeck.schema())``
    """
    load_entry_points()
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "A recipe file, or the name of a shipped recipe, that this one is merged over.",
    }
    # A recipe that extends another need not repeat what is there.
    schema["anyOf"] = [{"required": schema.pop("required")}, {"required": ["extends"]}]
    return schema


@dataclass(frozen=True)
class Entry:
    """A field of the schema: where it stands (kinds stand for themselves, list items and stage names are left out)."""

    path: tuple[str, ...]
    cls: type[BaseModel]
    key: str
    info: FieldInfo


def index() -> list[Entry]:
    """Every field that a recipe can have."""
    return list(_entries(Recipe, (), ()))


def _entries(cls: type[BaseModel], path: tuple[str, ...], inside: tuple[type, ...]) -> Iterator[Entry]:
    if cls in inside:
        return
    for key, info in fields_of(cls).items():
        yield Entry((*path, key), cls, key, info)
        for names, inner in _classes(field_shapes(info)):
            yield from _entries(inner, (*path, key, *names), (*inside, cls))


def _classes(found: Shapes) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    for shape in found:
        if isinstance(shape, ModelShape) and shape.cls is not From:
            yield (), shape.cls
        elif isinstance(shape, PartShape):
            yield from (((name,), shape.registry.options(name)) for name in shape.registry)
        elif isinstance(shape, ListShape):
            yield from _classes(shapes(shape.item))
        elif isinstance(shape, DictShape):
            yield from _classes(shapes(shape.value))


def explain(name: str) -> str:
    """What a recipe, a part (``hybridize``, ``mixer.swa``) or a field (``loop.tokens``) is and what it takes.

    ``print(limbeck.explain("loop.tokens"))``

    Raises:
        LimbeckError: nothing of that name, with the nearest ones.
    """
    load_entry_points()
    words = [word for word in name.replace(":", ".").replace(" ", ".").split(".") if word]
    texts = _recipe_text(name) + _part_texts(words) + _field_texts(words)
    if not texts:
        fields = {entry.key for entry in index()} | {part for registry in REGISTRIES.values() for part in registry}
        hint = did_you_mean(words[-1] if words else name, fields | set(shipped_recipes()))
        raise LimbeckError(
            f"nothing is called {name!r}{hint or ':'} names are those of `limbeck ls`, of recipes, and fields such as loop.tokens"
        )
    return "\n\n".join(texts)


def _recipe_text(name: str) -> list[str]:
    shipped = shipped_recipes()
    if name not in shipped:
        return []
    recipe = load_recipe(name)
    stages = "\n".join(f"  {stage:<10} {options.kind:<10} {summary(type(options))}" for stage, options in recipe.stages.items())
    return [f"recipe {name}\n{recipe.description}\n\n{stages}\n\n{header(name)}"]


def header(name: str) -> str:
    """The comment at the head of a shipped recipe."""
    lines = []
    for line in shipped_recipes()[name].read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    return "\n".join(lines)


def _part_texts(words: list[str]) -> list[str]:
    if not words:
        return []
    kind = {**{k: k for k in REGISTRIES}, **kinds()}.get(words[0]) if len(words) == 2 else None
    if len(words) > 2 or (len(words) == 2 and kind not in REGISTRIES):
        return []
    registries = [REGISTRIES[kind]] if kind in REGISTRIES else REGISTRIES.values()
    found = [(registry.kind, registry.options(words[-1])) for registry in registries if words[-1] in registry]
    return [f"{kind} {words[-1]}\n{_flow(inspect.getdoc(cls) or '')}\n\n{_options_text(cls)}" for kind, cls in found]


def _options_text(cls: type[BaseModel]) -> str:
    lines = []
    for key, info in fields_of(cls).items():
        default = "required" if info.is_required() else f"default {json.dumps(default_of(info), ensure_ascii=False)}"
        lines.append(f"  {key}: {describe_all(field_shapes(info))}; {default}")
        lines += [f"      {help_of(info)}"] if info.description else []
    return "\n".join(lines)


def _field_texts(words: list[str]) -> list[str]:
    words = [word for word in words if not word.isdigit()]
    if not words:
        return []
    entries = index()
    found = [entry for entry in entries if _matches(words, entry.path)]
    if not found and len(words) > 1:
        # A path out of an error message holds a stage's name, which the schema does not know.
        rest = words[2:] if words[0] == "stages" else words[1:]
        found = [entry for entry in entries if rest and _matches(rest, entry.path)]
    groups: dict[tuple[type, str], list[Entry]] = {}
    for entry in found:
        owner = next((c for c in reversed(entry.cls.__mro__) if entry.key in getattr(c, "model_fields", {})), entry.cls)
        groups.setdefault((owner, entry.key), []).append(entry)
    return [_field_text(group) for group in groups.values()]


def _matches(words: list[str], path: tuple[str, ...]) -> bool:
    """Whether the words stand in a path in their order, the last word last."""
    if words[-1] != path[-1]:
        return False
    steps = iter(path)
    return all(word in steps for word in words)


def _field_text(entries: list[Entry]) -> str:
    info = entries[0].info
    default = "required" if info.is_required() else f"default {json.dumps(default_of(info), ensure_ascii=False)}"
    places = some(".".join(entry.path) for entry in entries)
    text = f"{entries[0].key}: {describe_all(field_shapes(info))}; {default}\n  {help_of(info)}\n  at {places}"
    for _, cls in _classes(field_shapes(info)):
        if len(list(_classes(field_shapes(info)))) == 1:
            text += f"\n\n{_options_text(cls)}"
    return text
