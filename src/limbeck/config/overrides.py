"""``path.to.key=value`` words: a change to one value of a recipe, from the command line.

``stages.align.loop.tokens=1M``, or ``align.loop.tokens=1M`` for short; list items by their number
(``align.optim.groups.0.lr=1e-3``).  The value is YAML, so ``keep=[1, 5]`` and ``teacher=null`` work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from limbeck.config.base import Options
from limbeck.config.fields import AnyShape, DictShape, ListShape, ModelShape, PartShape, Shapes, field_shapes, fields_of, shapes
from limbeck.config.yaml_nodes import Node, parse
from limbeck.errors import Problem, did_you_mean


def apply_overrides(root: Node, words: Sequence[str], cls: type[Options], problems: list[Problem]) -> None:
    """Change ``root`` in place, one word after the other; what does not fit is added to ``problems``."""
    for word in words:
        path, equals, text = word.partition("=")
        where = f"override '{word if len(word) <= 80 else word[:77] + '...'}'"
        keys = path.strip().split(".")
        if not equals or not all(keys):
            problems.append(Problem(where, "", "write it as path.to.key=value, such as stages.align.loop.tokens=1M"))
            continue
        value = parse(text, "", problems, start=where)
        if value is None:
            continue
        try:
            _Setter(where, value).model(root, cls, _rooted(root, keys, cls, where), ())
        except _Misfit as misfit:
            problems.append(misfit.problem)


class _Misfit(Exception):
    def __init__(self, where: str, path: Sequence[str], message: str):
        self.problem = Problem(where, ".".join(path), message)


def _rooted(root: Node, keys: list[str], cls: type[Options], where: str) -> list[str]:
    """The full path of a short form: a stage's name may stand without ``stages.`` before it."""
    stages = root.value.get("stages")
    names = stages.value if stages is not None and isinstance(stages.value, dict) else {}
    stage = next((name for name in sorted(names, key=len, reverse=True) if ".".join(keys).startswith(f"{name}.")), None)
    if stage is None or keys[0] == "stages":
        return keys
    if keys[0] in fields_of(cls):
        raise _Misfit(where, keys, f"{keys[0]!r} is a field of the recipe and a stage: write stages.{'.'.join(keys)}")
    return ["stages", *keys]


@dataclass
class _Setter:
    """Walks tree and schema side by side, making the mappings that are missing on the way."""

    where: str
    new: Node

    def model(self, node: Node, cls: type[BaseModel], keys: list[str], trail: tuple[str, ...]) -> None:
        known = fields_of(cls)
        key, rest = keys[0], keys[1:]
        if key not in known:
            names = [*known, *self._stages(node, trail)]
            hint = did_you_mean(key, names) or ";"
            raise _Misfit(self.where, (*trail, key), f"there is no such key{hint} here are: {', '.join(names)}")
        self.step(node, key, rest, field_shapes(known[key]), (*trail, key))

    def _stages(self, node: Node, trail: tuple[str, ...]) -> list[str]:
        stages = node.value.get("stages") if not trail and isinstance(node.value, dict) else None
        return list(stages.value) if stages is not None and isinstance(stages.value, dict) else []

    def step(self, node: Node, key: str, rest: list[str], found: Shapes, trail: tuple[str, ...]) -> None:
        """Set ``key`` of a mapping, or go on below it."""
        if not rest:
            self.new.key_at = self.where
            node.value[key] = self.new
            return
        child = node.value.get(key)
        if child is None or child.value is None:
            child = Node({}, self.where, self.where)
            self.descend(child, rest, found, trail)
            node.value[key] = child
        else:
            self.descend(child, rest, found, trail)

    def descend(self, node: Node, keys: list[str], found: Shapes, trail: tuple[str, ...]) -> None:
        lists = next((shape for shape in found if isinstance(shape, ListShape)), None)
        if isinstance(node.value, list):
            self.item(node, keys, lists, trail)
            return
        if isinstance(node.value, str) and any(isinstance(shape, PartShape) for shape in found):
            node.value = {"kind": Node(node.value, node.at, node.key_at)}
        if not isinstance(node.value, dict):
            raise _Misfit(self.where, (*trail, keys[0]), f"'{'.'.join(trail)}' is a single value here, with nothing below it")
        if lists is not None and lists.lone and not keys[0].isdigit():
            found = shapes(lists.item)
        self.mapping(node, keys, found, trail)

    def mapping(self, node: Node, keys: list[str], found: Shapes, trail: tuple[str, ...]) -> None:
        plain = node.plain()
        for shape in found:
            if isinstance(shape, PartShape):
                asked = {**plain, "kind": self.new.value} if keys == ["kind"] else plain
                options = shape.options_of(asked)
                if options is None:
                    hint = f"write {'.'.join((*trail, 'kind'))}=… first: {', '.join(shape.registry)}"
                    raise _Misfit(self.where, (*trail, keys[0]), f"which {shape.registry.kind} is not said; {hint}")
                return self.model(node, options, keys, trail)
            if isinstance(shape, DictShape):
                return self.free(node, keys, shape, trail)
        models = [shape.cls for shape in found if isinstance(shape, ModelShape)]
        if not models and any(isinstance(shape, AnyShape) for shape in found):
            return self.step(node, keys[0], keys[1:], found, (*trail, keys[0]))
        if not models:
            raise _Misfit(self.where, (*trail, keys[0]), f"'{'.'.join(trail)}' takes a single value, with nothing below it")
        fitting = [cls for cls in models if keys[0] in fields_of(cls) and set(plain) <= set(fields_of(cls))]
        return self.model(node, (fitting or models)[0], keys, trail)

    def free(self, node: Node, keys: list[str], shape: DictShape, trail: tuple[str, ...]) -> None:
        """A mapping with free keys, which may have dots in them."""
        inner = shapes(shape.value)
        longest = next((n for n in range(len(keys), 0, -1) if ".".join(keys[:n]) in node.value), None)
        if longest is None and any(isinstance(option, PartShape) for option in inner):
            hint = did_you_mean(keys[0], node.value) or ";"
            message = f"there is no such {trail[-1].rstrip('s')}{hint} here are: {', '.join(node.value)}"
            raise _Misfit(self.where, (*trail, keys[0]), message)
        if longest is None:
            longest = 1 if any(isinstance(option, AnyShape) for option in inner) else len(keys)
        key = ".".join(keys[:longest])
        self.step(node, key, keys[longest:], inner, (*trail, key))

    def item(self, node: Node, keys: list[str], shape: ListShape | None, trail: tuple[str, ...]) -> None:
        key, rest = keys[0], keys[1:]
        if not key.isdecimal() or int(key) >= len(node.value):
            size = len(node.value)
            allowed = f"0 to {size - 1}" if size else "none, it is empty"
            message = f"'{'.'.join(trail)}' is a list of {size}: an item is named by its number, {allowed}"
            raise _Misfit(self.where, (*trail, key), message)
        if rest:
            self.descend(node.value[int(key)], rest, shapes(shape.item) if shape else Shapes((AnyShape(),)), (*trail, key))
        else:
            node.value[int(key)] = self.new
