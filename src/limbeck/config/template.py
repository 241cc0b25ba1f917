"""``limbeck init``: a shipped recipe written out with every field explained.

What the recipe sets stands as it is; what it leaves alone stands commented out with its default.  A class of options is
explained where it first occurs.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

from pydantic import BaseModel

from limbeck.config.base import From
from limbeck.config.explain import default_of, header, help_of, summary
from limbeck.config.fields import (
    DictShape,
    ListShape,
    ModelShape,
    PartShape,
    Shapes,
    describe_all,
    field_shapes,
    fields_of,
    flat,
    shapes,
)
from limbeck.config.load import find_recipe, shipped_recipes, shipped_tree
from limbeck.config.recipe import Recipe
from limbeck.errors import LimbeckError, did_you_mean

_WIDTH = 110
_PLAIN = re.compile(r"[A-Za-z/_][\w./+-]*(?::[\w./+-]+)*(?: [\w./+-]+)*")
_OTHER_SCALARS = re.compile(r"(?i:true|false|null|nan|inf)|[-+.\d].*")


def template(name: str) -> str:
    """YAML text of a shipped recipe with comments; it loads to the same recipe.

    ``Path("my.yaml").write_text(limbeck.template("hybrid"))``

    Raises:
        LimbeckError: no shipped recipe of that name.
    """
    shipped = shipped_recipes()
    if name not in shipped:
        raise LimbeckError(f"no shipped recipe {name!r}{did_you_mean(name, shipped) or ';'} shipped: {', '.join(shipped)}")
    data = shipped_tree(find_recipe(name)).plain()
    body = _Writer().model(Recipe, data, "")
    note = "# Lines commented out show defaults.  `limbeck check FILE` says what it would do; `limbeck run FILE` does it."
    return "\n".join([header(name), "#", note, *body, ""])


class _Writer:
    def __init__(self) -> None:
        self.explained: set[type] = set()

    def model(self, cls: type[BaseModel], data: dict[str, Any], indent: str) -> list[str]:
        first = cls not in self.explained
        self.explained.add(cls)
        lines: list[str] = []
        for key, info in fields_of(cls).items():
            if key not in data and (not first or info.is_required() or key == "kind"):
                continue
            help_text = f"{summary(cls)}." if key == "kind" else help_of(info)
            if first and help_text:
                lines += _comment(help_text, indent)
            if key in data:
                lines += self.entry(key, data[key], field_shapes(info), indent)
            else:
                lines += self.default(key, default_of(info), field_shapes(info), indent)
        return lines

    def default(self, key: str, value: Any, found: Shapes, indent: str) -> list[str]:
        """A field that the recipe leaves alone: commented out, with what would stand below it."""
        models = [shape.cls for shape in found if isinstance(shape, ModelShape) and shape.cls is not From]
        if isinstance(value, dict) and len(models) == 1 and models[0] not in self.explained:
            below = self.model(models[0], value, "  ")
            return [f"{indent}# {line}".rstrip() for line in (f"{key}:", *below)]
        lines = [f"{indent}# {key}: {_inline(value)}"]
        if value is None and len(models) == 1 and len(found.options) == 1:
            keys = ", ".join(f"{k}: {describe_all(field_shapes(info))}" for k, info in fields_of(models[0]).items())
            lines += _comment(f"takes {{{keys}}}", indent)
        elif value is None and any(isinstance(shape, PartShape) for shape in found):
            lines += _comment(f"takes {describe_all(found)}", indent)
        return lines

    def entry(self, key: str, value: Any, found: Shapes, indent: str) -> list[str]:
        key = key if _PLAIN.fullmatch(key) and not _OTHER_SCALARS.fullmatch(key) else _inline(key)
        if isinstance(value, dict) and value:
            lines = self.mapping(value, found, indent + "  ")
            return [f"{indent}{key}:", *lines]
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            items = Shapes(tuple(option for shape in found if isinstance(shape, ListShape) for option in shapes(shape.item)))
            lines = [f"{indent}{key}:"]
            for item in value:
                lines += self.item(item, items, indent + "  ")
            return lines
        return [f"{indent}{key}: {_inline(value)}"]

    def item(self, value: Any, found: Shapes, indent: str) -> list[str]:
        if not isinstance(value, dict) or not value:
            return [f"{indent}- {_inline(value)}"]
        lines = self.mapping(value, found, indent + "  ")
        # The dash goes before the first key; its comment, if there is one, stays above it.
        at = next(i for i, line in enumerate(lines) if not line.lstrip().startswith("#"))
        above = [line[2:] if line.startswith("  ") else line for line in lines[:at]]
        return [*above, f"{indent}- {lines[at][len(indent) + 2 :]}", *lines[at + 1 :]]

    def mapping(self, value: dict[str, Any], found: Shapes, indent: str) -> list[str]:
        cls = class_for(value, found)
        if cls is not None:
            return self.model(cls, value, indent)
        lines: list[str] = []
        free = next((shape for shape in flat(found) if isinstance(shape, DictShape)), None)
        for key, item in value.items():
            lines += self.entry(key, item, shapes(free.value) if free else Shapes(()), indent)
        return lines


def class_for(value: dict[str, Any], found: Shapes) -> type[BaseModel] | None:
    """The options class that a mapping is meant for."""
    for shape in flat(found):
        if isinstance(shape, PartShape):
            return shape.options_of(value)
    models = [shape.cls for shape in found if isinstance(shape, ModelShape)]
    return next((cls for cls in models if set(value) <= set(fields_of(cls))), None)


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_long_words=False)


def _inline(value: Any) -> str:
    """A value in YAML's flow style, plain where that is safe."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(_inline(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_inline(key)}: {_inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and not (_PLAIN.fullmatch(value) and not _OTHER_SCALARS.fullmatch(value)):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
        return value if re.fullmatch(r"[0-9]+[kMBT]", value) else f'"{escaped}"'
    return str(value) if isinstance(value, str) else repr(value)
