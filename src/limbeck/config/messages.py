"""pydantic's errors -> plain words at the right place.

pydantic reports every branch of a union; a person meant one of them.  The walk below follows the annotations beside the
data, keeps the branch that fits best, and names keys as they are written in the recipe.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from limbeck.config.fields import (
    AnyShape,
    DictShape,
    ListShape,
    ModelShape,
    PartShape,
    ScalarShape,
    Shape,
    Shapes,
    describe_all,
    field_shapes,
    fields_of,
    shapes,
)
from limbeck.errors import did_you_mean

Path = tuple[str | int, ...]
Located = tuple[tuple[str | int, ...], ErrorDetails]
"""What is left of an error's location, and the error."""


@dataclass(frozen=True)
class Finding:
    """One thing wrong with a value; ``on_key`` when the key itself is the mistake."""

    path: Path
    message: str
    on_key: bool = False


def findings(cls: type[BaseModel], data: Any, errors: Sequence[ErrorDetails]) -> list[Finding]:
    """Every finding of a failed validation of ``data`` as ``cls``, in the order of pydantic's report."""
    return list(dict.fromkeys(_model(cls, data, [(e["loc"], e) for e in errors], ())))


def complaints(error: ValidationError, cls: type[BaseModel], data: Any) -> list[str]:
    """:func:`findings` of values that come from no file, a line each: the path, and what is wrong there."""
    found = findings(cls, data, error.errors(include_url=False))
    return [f"{'.'.join(map(str, one.path))}: {one.message}" if one.path else one.message for one in found]


def show(value: Any) -> str:
    """A value as a recipe would write it, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    if len(text) > 60:
        text = text[:50] + "…"
    return text


def _found(value: Any) -> str:
    kind = " (a mapping)" if isinstance(value, dict) else " (a list)" if isinstance(value, list) else ""
    kind = " (text)" if isinstance(value, str) else kind
    return f"found {show(value)}{kind}"


def _model(cls: type[BaseModel], data: Any, errors: list[Located], path: Path) -> Iterator[Finding]:
    known = fields_of(cls)
    for key, group in _grouped(errors).items():
        if key is None:
            yield from (_leaf(error, data, None, path) for _, error in group)
            continue
        types = {error["type"] for rest, error in group if not rest}
        if "extra_forbidden" in types:
            hint = did_you_mean(str(key), known) or ";"
            yield Finding((*path, key), f"unknown key{hint} allowed: {', '.join(known)}", on_key=True)
        elif "missing" in types:
            info = known.get(str(key))
            what = f": {_first_sentence(info.description)}" if info and info.description else ""
            yield Finding(path, f"needs `{key}`{what}", on_key=True)
        else:
            info = known.get(str(key))
            value = data.get(key) if isinstance(data, dict) else None
            yield from _value(field_shapes(info) if info else Shapes((AnyShape(),)), value, group, (*path, key))


def _first_sentence(text: str) -> str:
    return text.replace("\n", " ").split(". ")[0].rstrip(".")


def _grouped(errors: list[Located]) -> dict[Any, list[Located]]:
    """Errors by the first step of what is left of their location; None for those that have arrived."""
    groups: dict[Any, list[Located]] = {}
    for loc, error in errors:
        groups.setdefault(loc[0] if loc else None, []).append((loc[1:], error))
    return groups


def _value(found: Shapes, data: Any, errors: list[Located], path: Path) -> Iterator[Finding]:
    if len(found.options) == 1:
        yield from _shape(found.options[0], found, data, errors, path)
        return
    arrived = [(loc, error) for loc, error in errors if not loc]
    yield from (_leaf(error, data, found, path) for _, error in arrived)
    branches = {tag: group for tag, group in _grouped([e for e in errors if e[0]]).items() if tag is not None}
    if not branches:
        return
    inside = {tag: group for tag, group in branches.items() if any(loc or _of_value(error) for loc, error in group)}
    if not inside:
        yield Finding(path, f"must be {describe_all(found)}; {_found(data)}{_near_choice(found, data)}")
        return
    tag = min(inside, key=lambda name: _misfit(inside[name]))
    shape = next((option for option in found if _is_branch(str(tag), option)), AnyShape())
    yield from _shape(shape, found, data, inside[tag], path)


def _of_value(error: ErrorDetails) -> bool:
    """Whether a branch took the value's type and refused its content."""
    return not error["type"].endswith(("_type", "_parsing", "literal_error"))


def _misfit(errors: list[Located]) -> tuple[int, int]:
    keys = sum(1 for loc, error in errors if len(loc) == 1 and error["type"] in ("extra_forbidden", "missing"))
    whole = sum(1 for loc, error in errors if not loc and error["type"] == "model_type")
    return keys + 100 * whole, len(errors)


def _is_branch(tag: str, shape: Shape) -> bool:
    """Whether pydantic's name of a union branch stands for a shape."""
    if isinstance(shape, ModelShape):
        return tag == shape.cls.__name__ or shape.cls.__name__ in tag
    if isinstance(shape, PartShape):
        return tag.startswith("function-plain")
    if isinstance(shape, ListShape):
        return any(word in tag for word in ("tuple[", "list[", "set["))
    if isinstance(shape, DictShape):
        return "dict[" in tag
    if isinstance(shape, ScalarShape):
        return tag.startswith("literal[") if shape.type is None else shape.type.__name__ in tag
    return False


def _shape(shape: Shape, found: Shapes, data: Any, errors: list[Located], path: Path) -> Iterator[Finding]:
    if isinstance(shape, PartShape):
        options = shape.options_of(data)
        if options is not None:
            yield from _model(options, {"kind": data} if isinstance(data, str) else data, errors, path)
            return
    if isinstance(shape, ModelShape) and any(loc for loc, _ in errors):
        yield from _model(shape.cls, data, errors, path)
        return
    for key, group in _grouped(errors).items():
        if key is None:
            yield from (_leaf(error, data, found, path) for _, error in group if not _is_echo(error, data))
        elif isinstance(shape, ListShape):
            lone = not isinstance(data, list)
            item = data if lone else data[key] if isinstance(key, int) and key < len(data) else None
            yield from _value(shapes(shape.item), item, group, path if lone else (*path, key))
        elif isinstance(shape, DictShape):
            if any(loc == ("[key]",) for loc, _ in group):
                yield Finding((*path, key), f"not a key that can stand here: {show(key)}", on_key=True)
            else:
                yield from _value(shapes(shape.value), data.get(key) if isinstance(data, dict) else None, group, (*path, key))
        else:
            yield from (_leaf(error, error["input"], None, (*path, key, *rest)) for rest, error in group)


def _is_echo(error: ErrorDetails, data: Any) -> bool:
    """Whether a list is called too short only because its items, which have errors of their own, were not counted."""
    return error["type"] == "too_short" and (not isinstance(data, list) or len(data) >= error["ctx"]["min_length"])


_COMPARISONS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}


def _leaf(error: ErrorDetails, data: Any, found: Shapes | None, path: Path) -> Finding:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        return Finding(path, str(context.get("error", error["msg"])))
    if kind in _COMPARISONS:
        words, name = _COMPARISONS[kind]
        return Finding(path, f"must be {words} {context[name]}; {_found(data)}")
    if kind == "too_short":
        return Finding(path, f"needs at least {context['min_length']} item(s); {_found(data)}")
    if kind == "too_long":
        return Finding(path, f"takes at most {context['max_length']} item(s); {_found(data)}")
    if kind == "missing":
        return Finding(path, f"an item is missing here; {_found(data)}")
    if kind == "finite_number":
        return Finding(path, f"must be a finite number; {_found(data)}")
    if kind == "part_kind" and isinstance(data, dict) and "kind" in data:
        return Finding((*path, "kind"), error["msg"])
    if kind.startswith("part_"):
        return Finding(path, error["msg"] if kind != "part_type" else f"{error['msg']}; {_found(data)}")
    if found is not None and _is_type_error(kind):
        return Finding(path, f"must be {describe_all(found)}; {_found(data)}{_near_choice(found, data)}")
    message = error["msg"].removeprefix("Input should be").removeprefix("Value error,").strip()
    return Finding(path, f"{message}; {_found(data)}" if message == error["msg"] else f"must be {message}; {_found(data)}")


def _is_type_error(kind: str) -> bool:
    return kind.endswith(("_type", "_parsing", "_parsing_size")) or kind in ("literal_error", "int_from_float", "quantity")


def _near_choice(found: Shapes, data: Any) -> str:
    choices = [str(c) for shape in found if isinstance(shape, ScalarShape) for c in shape.choices]
    return did_you_mean(data, choices) if isinstance(data, str) else ""


def mistaken_scalars(found: Shapes, data: Any, path: Path = ()) -> Iterator[Finding]:
    """Values that pydantic would quietly convert and nobody means: ``seed: true``, ``deterministic: yes``."""
    scalars = [shape for shape in found if isinstance(shape, ScalarShape)]
    if isinstance(data, dict):
        yield from _mistaken_in_mapping(found, data, path)
    elif isinstance(data, list):
        lists = [shape for shape in found if isinstance(shape, ListShape)]
        for i, item in enumerate(data):
            yield from (f for shape in lists for f in mistaken_scalars(shapes(shape.item), item, (*path, i)))
    elif scalars and len(scalars) == len(found.options):
        booleans = any(shape.type is bool or True in shape.choices for shape in scalars)
        only_boolean = all(shape.type is bool for shape in scalars)
        if (isinstance(data, bool) and not booleans) or (only_boolean and data is not None and not isinstance(data, bool)):
            yield Finding(path, f"must be {describe_all(found)}; {_found(data)}")


def _mistaken_in_mapping(found: Shapes, data: dict[str, Any], path: Path) -> Iterator[Finding]:
    for shape in found:
        if isinstance(shape, DictShape):
            for key, value in data.items():
                yield from mistaken_scalars(shapes(shape.value), value, (*path, key))
        options = shape.cls if isinstance(shape, ModelShape) else shape.options_of(data) if isinstance(shape, PartShape) else None
        for key, info in fields_of(options).items() if options else ():
            if key in data:
                yield from mistaken_scalars(field_shapes(info), data[key], (*path, key))
        if isinstance(shape, ListShape) and shape.lone:
            yield from mistaken_scalars(shapes(shape.item), data, path)
