"""YAML text -> a tree of values that know where they stand.

``yaml.compose`` gives marks; everything above works on :class:`Node`, so that values merged from several files, overrides
and anchors all keep the place that a person has to look at.  Numbers and booleans follow YAML 1.2: ``1e-3`` is a float,
only ``true`` and ``false`` are booleans, dates stay text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from limbeck.errors import Problem

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 40
MAX_NODES = 50_000
_CORE = "tag:yaml.org,2002:"


@dataclass
class Node:
    """A value and its place.  ``value`` is a dict or list of nodes, or a scalar; ``at`` is ``file:line:col``."""

    value: Any
    at: str
    key_at: str | None = None
    """Place of the key, for values of a mapping."""

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def child(self, key: str | int) -> Node | None:
        """The node under a key or index, if there is one."""
        if isinstance(self.value, dict):
            return self.value.get(str(key))
        if isinstance(self.value, list) and isinstance(key, int) and 0 <= key < len(self.value):
            return self.value[key]
        return None

    def place(self, path: Sequence[str | int], on_key: bool = False) -> str:
        """Where a path stands, or the nearest thing above it that was written down."""
        node, found = self, True
        for key in path:
            inner = node.child(key)
            if inner is None:
                found = False
                break
            node = inner
        return node.key_at if node.key_at and (on_key or not found) else node.at

    def walk(self, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Node]]:
        """Every node below with its path, this one first."""
        yield path, self
        if isinstance(self.value, dict):
            for key, child in self.value.items():
                yield from child.walk((*path, key))
        elif isinstance(self.value, list):
            for i, child in enumerate(self.value):
                yield from child.walk((*path, i))


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's plain scalars and a bound on nesting."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own class attribute)
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"nested more than {MAX_DEPTH} levels deep", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_INT = r"[-+]?(?:[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("merge", "<<", "<"),
):
    _Loader.add_implicit_resolver(_CORE + _tag, re.compile(f"^(?:{_pattern})$"), list(_first))


def decode(data: bytes, label: str, problems: list[Problem]) -> str | None:
    """UTF-8 text of a file, or None and a problem that names the line of the first bad byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        found = f"byte 0x{data[error.start]:02x} is not UTF-8: save the file as UTF-8"
        problems.append(Problem(f"{label}:{line}:{column}", "", found))
        return None


def parse(text: str, label: str, problems: list[Problem], *, start: str | None = None) -> Node | None:
    """The tree of one YAML document; None when the text cannot be read at all.

    ``label`` is the file's name in places.  ``start`` is given for override words, whose nodes all stand "at" the word.
    """

    def place(mark: Any) -> str:
        return start or f"{label}:{mark.line + 1}:{mark.column + 1}"

    if len(text) > MAX_CHARACTERS:
        problems.append(Problem(start or f"{label}:1:1", "", f"{len(text)} characters: a recipe has at most {MAX_CHARACTERS}"))
        return None
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line, column = text.count("\n", 0, error.position) + 1, error.position - text.rfind("\n", 0, error.position)
        where = start or f"{label}:{line}:{column}"
        problems.append(Problem(where, "", f"character {error.character:#04x} is not allowed in YAML"))
        return None
    except yaml.MarkedYAMLError as error:
        problems.append(Problem(place(error.problem_mark or error.context_mark), "", "YAML: " + _syntax(error)))
        return None
    except (ValueError, OverflowError):
        # PyYAML's scanner lets a bad \U escape through as a plain ValueError.
        where = place(loader.get_mark()) if loader else start or f"{label}:1:1"
        problems.append(Problem(where, "", "YAML: not a character that exists"))
        return None
    if root is None:
        return Node(None, start or f"{label}:1:1")
    return _Builder(problems, place).build(root)


def _syntax(error: yaml.MarkedYAMLError) -> str:
    words = (error.problem or error.context or "syntax error").rstrip(".")
    if "\\t" in words or "'\t'" in words:
        return "a tab where YAML wants spaces: indent with spaces"
    if "expected <block end>" in words:
        return f"{words}: this line's indentation does not fit the lines above it"
    if words == "mapping values are not allowed here":
        return "a second ': ' on one line: check the indentation, or quote the text"
    if words == "but found another document":
        return "a second document ('---'): a recipe is one document"
    if error.context and error.context_mark and error.problem_mark and error.context_mark.line != error.problem_mark.line:
        return f"{words} ({error.context}, which began at line {error.context_mark.line + 1})"
    return f"{words} ({error.context})" if error.context and error.problem else words


@dataclass
class _Builder:
    """PyYAML's nodes -> :class:`Node`, with every problem collected."""

    problems: list[Problem]
    place: Any
    count: int = 0
    open: set[int] = field(default_factory=set)

    def build(self, node: yaml.Node, path: str = "") -> Node:
        at = self.place(node.start_mark)
        self.count += 1
        if self.count == MAX_NODES:
            self.problems.append(Problem(at, "", f"more than {MAX_NODES} values once its aliases are expanded"))
        if self.count >= MAX_NODES:
            return Node(None, at)
        if id(node) in self.open:
            self.problems.append(Problem(at, "", "an anchor that contains itself"))
            return Node(None, at)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.ScalarNode):
                return Node(self.scalar(node, at), at)
            if node.tag not in (_CORE + "map", _CORE + "seq"):
                self.tag(node, at)
            if isinstance(node, yaml.SequenceNode):
                return Node([self.build(child, f"{path}.{i}".lstrip(".")) for i, child in enumerate(node.value)], at)
            return Node(self.mapping(node, path), at)
        finally:
            self.open.discard(id(node))

    def mapping(self, node: yaml.Node, path: str) -> dict[str, Node]:
        explicit: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key_node, value_node in node.value:
            at = self.place(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Problem(at, "", "a key must be a word, not a list or a mapping"))
                continue
            if key_node.tag == _CORE + "merge":
                for key, child in self.merge(value_node).items():
                    merged.setdefault(key, child)
                continue
            key = self.text(key_node.value, at)
            below = f"{path}.{key}".lstrip(".")
            child = self.build(value_node, below)
            child.key_at = at
            if key in explicit:
                first = explicit[key].key_at
                self.problems.append(Problem(at, below, f"this key stands twice, first at {first}: keep one"))
            explicit[key] = child
        return {**merged, **explicit}

    def merge(self, node: yaml.Node) -> dict[str, Node]:
        """``<<: *anchor`` or a list of them; earlier ones win."""
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        found: dict[str, Node] = {}
        for item in items:
            built = self.build(item)
            if not isinstance(built.value, dict):
                self.problems.append(Problem(built.at, "", "`<<` merges mappings: it needs an alias of one"))
                continue
            for key, child in built.value.items():
                found.setdefault(key, child)
        return found

    def scalar(self, node: yaml.ScalarNode, at: str) -> Any:
        text = node.value
        kind = node.tag.removeprefix(_CORE)
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                digits = text.replace("_", "").lower()
                base = 16 if "0x" in digits else 8 if "0o" in digits else 10
                return int(digits, base)
            if kind == "float":
                # YAML writes infinity as `.inf`, Python as `inf`.
                return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
        except (ValueError, KeyError):
            shown = text if len(text) <= 40 else f"{text[:20]}… ({len(text)} digits)"
            self.problems.append(Problem(at, "", f"{shown} cannot be read as {'a number' if kind in ('int', 'float') else kind}"))
            return None
        if kind != "str":
            self.tag(node, at)
        return self.text(text, at)

    def text(self, text: str, at: str) -> str:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            self.problems.append(Problem(at, "", "half of a surrogate pair: write the character itself"))
            return text.encode("utf-8", "replace").decode("utf-8")
        return text

    def tag(self, node: yaml.Node, at: str) -> None:
        shown = node.tag.replace(_CORE, "!!")
        self.problems.append(Problem(at, "", f"the tag {shown!r} is not used in recipes: write a plain value"))
