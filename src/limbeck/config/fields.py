"""What the options classes allow, read from their annotations: for error messages, overrides, ``explain`` and ``init``."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from limbeck.config.base import From, Hint, OneOrMany, PartOf
from limbeck.registry import Registry

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class ModelShape:
    """A mapping with the keys of one options class."""

    cls: type[BaseModel]


@dataclass(frozen=True)
class PartShape:
    """A mapping whose ``kind`` picks the options class from a registry."""

    registry: Registry
    default: str | None

    def options_of(self, value: Any) -> type[BaseModel] | None:
        """The options class that a raw value asks for; None when its kind is missing or unknown."""
        kind = value if isinstance(value, str) else value.get("kind", self.default) if isinstance(value, dict) else None
        return self.registry.options(kind) if isinstance(kind, str) and kind in self.registry else None


@dataclass(frozen=True)
class ListShape:
    """A list; ``lone`` when one item may stand without brackets."""

    item: Any
    lone: bool


@dataclass(frozen=True)
class DictShape:
    """A mapping with free keys."""

    value: Any


@dataclass(frozen=True)
class ScalarShape:
    """Text, a number, true/false, or one of a few words."""

    type: type | None
    words: str
    choices: tuple[Any, ...] = ()
    environment: bool = False
    secret: bool = False


@dataclass(frozen=True)
class AnyShape:
    """Anything at all (or something that only its own validator understands)."""


Shape = ModelShape | PartShape | ListShape | DictShape | ScalarShape | AnyShape


@dataclass(frozen=True)
class Shapes:
    """The alternatives of one annotation."""

    options: tuple[Shape, ...]
    nullable: bool = False

    def __iter__(self) -> Iterator[Shape]:
        return iter(self.options)


def shapes(annotation: Any, metadata: Sequence[Any] = ()) -> Shapes:
    """What an annotation accepts, unions laid flat."""
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        return shapes(inner, [*extra, *metadata])
    if get_origin(annotation) in (Union, types.UnionType):
        bounds = [m for m in metadata if isinstance(m, Ge | Gt | Le | Lt)]
        found = [shapes(member, bounds) for member in get_args(annotation) if member is not type(None)]
        options = tuple(option for item in found for option in item)
        return Shapes(options, type(None) in get_args(annotation) or any(item.nullable for item in found))
    return Shapes((_shape(annotation, metadata),), annotation is type(None))


def _shape(annotation: Any, metadata: Sequence[Any]) -> Shape:
    choice = next((m for m in metadata if isinstance(m, PartOf)), None)
    if choice is not None:
        return PartShape(choice.registry, choice.default)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ScalarShape(None, _join(arguments), arguments)
    if origin in (tuple, list, set, frozenset):
        return ListShape(arguments[0], any(isinstance(m, OneOrMany) for m in metadata))
    if origin is dict:
        return DictShape(arguments[1])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return ModelShape(annotation)
    if annotation in _WORDS:
        hint = next((m for m in metadata if isinstance(m, Hint)), None)
        words = hint.words if hint else _WORDS[annotation] + _bounds(metadata)
        return ScalarShape(annotation, words, environment=bool(hint and hint.environment), secret=bool(hint and hint.secret))
    return AnyShape()


def _bounds(metadata: Sequence[Any]) -> str:
    words = []
    metadata = [inner for m in metadata for inner in (m.metadata if isinstance(m, FieldInfo) else [m])]
    for m in metadata:
        if isinstance(m, Gt):
            words.append(f"above {m.gt}")
        elif isinstance(m, Ge):
            words.append(f"at least {m.ge}")
        elif isinstance(m, Lt):
            words.append(f"below {m.lt}")
        elif isinstance(m, Le):
            words.append(f"at most {m.le}")
    return " " + " and ".join(words) if words else ""


def _join(choices: Sequence[Any]) -> str:
    names = [str(c) for c in choices]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def field_shapes(info: FieldInfo) -> Shapes:
    """What one field accepts."""
    return shapes(info.annotation, info.metadata)


def fields_of(cls: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of an options class by the key that a recipe uses."""
    return {info.alias or name: info for name, info in cls.model_fields.items()}


def flat(found: Shapes) -> Iterator[Shape]:
    """The alternatives, and those of an item that may stand without brackets."""
    for shape in found:
        yield shape
        if isinstance(shape, ListShape) and shape.lone:
            yield from shapes(shape.item)


def describe(shape: Shape) -> str:
    """One alternative in words."""
    if isinstance(shape, ModelShape):
        if shape.cls is From:
            return "{from: stage}"
        return "a mapping with " + ", ".join(fields_of(shape.cls))
    if isinstance(shape, PartShape):
        return f"{with_article(shape.registry.kind)} ({', '.join(shape.registry)})"
    if isinstance(shape, ListShape):
        return "a list of " + describe_all(shapes(shape.item))
    if isinstance(shape, DictShape):
        return "a mapping"
    if isinstance(shape, ScalarShape):
        return shape.words
    return "any value"


def with_article(noun: str) -> str:
    """``a mixer``, ``an objective``."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def describe_all(found: Shapes) -> str:
    """All alternatives in words."""
    words = list(dict.fromkeys(describe(shape) for shape in found))
    return " or ".join([*words, "null"] if found.nullable else words)
