"""Recipe files -> :class:`Recipe`, with every problem found reported at once and at its place.

The order: read (and merge what ``extends`` names), apply overrides, expand ``${env:NAME}``, import plug-ins, validate,
check what the stages say about each other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import limbeck.config.parts
import limbeck.recipes
from limbeck.config.base import From
from limbeck.config.fields import (
    DictShape,
    ListShape,
    ModelShape,
    PartShape,
    ScalarShape,
    Shape,
    Shapes,
    field_shapes,
    fields_of,
    flat,
    shapes,
)
from limbeck.config.messages import Finding, findings, mistaken_scalars
from limbeck.config.overrides import apply_overrides
from limbeck.config.plugins import load_entry_points, load_plugin
from limbeck.config.recipe import Recipe, reference_problems, stage_problems
from limbeck.config.yaml_nodes import Node, decode, parse
from limbeck.errors import LimbeckError, Problem, RecipeError, did_you_mean

SHIPPED = Path(limbeck.recipes.__file__).parent
_SUFFIXES = (".yaml", ".yml")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def find_recipe(path_or_name: str | Path) -> Path:
    """The file of a path or of a shipped recipe's name; raises :class:`RecipeError`."""
    path, name = Path(path_or_name), str(path_or_name)
    shipped = shipped_recipes()
    try:
        if path.is_file():
            return path
        if name in shipped:
            return shipped[name]
        folder = path.is_dir()
    except (OSError, ValueError) as error:
        raise RecipeError([Problem("", repr(name), f"cannot be read ({error}): name a recipe's file, or a shipped recipe")]) from error
    if folder:
        inside = [file.name for suffix in _SUFFIXES for file in sorted(path.glob(f"*{suffix}"))]
        there = f": {', '.join(inside[:4])}" if inside else ", of which it has none that ends in .yaml"
        raise RecipeError([Problem("", name, f"is a folder: name a recipe's file in it{there}")])
    hint = did_you_mean(name.removesuffix(".yaml"), shipped) or f"; shipped: {', '.join(shipped)}"
    raise RecipeError([Problem("", name, f"no such file, and no shipped recipe of that name{hint}")])


def recipe_folder(path_or_name: str | Path) -> Path:
    """Where a recipe's relative paths start: its own folder, or the working directory for a shipped one."""
    path = find_recipe(path_or_name)
    return Path.cwd() if path.parent == SHIPPED else path.parent.resolve()


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge, override and validate a recipe file or a shipped recipe.

    Raises :class:`RecipeError` with every problem found, each with ``file:line:col``.
    """
    path = find_recipe(path_or_name)
    problems: list[Problem] = []
    text = _read(path, problems)
    if text is None:
        raise RecipeError(problems)
    folder = recipe_folder(path)
    recipe = _load(text, _label(path), path.parent, folder, (path.resolve(),), overrides)
    recipe.__dict__["folder"] = folder
    return recipe


def load_text(text: str, overrides: Sequence[str] = (), *, label: str = "recipe.yaml", base_dir: Path | None = None) -> Recipe:
    """:func:`load_recipe` for text that is no file; relative names start at ``base_dir``."""
    folder = base_dir or Path.cwd()
    return _load(text, label, folder, folder, (), overrides)


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every default filled in, as JSON values; ``Recipe.model_validate`` takes it back unchanged."""
    return recipe.model_dump(mode="json", by_alias=True)


def shipped_tree(path: Path) -> Node:
    """The merged but unvalidated tree of a recipe file."""
    problems: list[Problem] = []
    text = _read(path, problems)
    root = read_tree(text, _label(path), path.parent, (path.resolve(),), problems) if text is not None else None
    if root is None or problems:
        raise RecipeError(problems)
    return root


def _label(path: Path) -> str:
    return path.name if path.parent == SHIPPED else str(path)


def _read(path: Path, problems: list[Problem]) -> str | None:
    try:
        return decode(path.read_bytes(), _label(path), problems)
    except OSError as error:
        problems.append(Problem(_label(path), "", f"cannot be read ({error.strerror}): let yourself read it, or name another file"))
        return None


def _load(text: str, label: str, folder: Path, base_dir: Path, chain: tuple[Path, ...], overrides: Sequence[str]) -> Recipe:
    problems: list[Problem] = []
    root = read_tree(text, label, folder, chain, problems)
    if root is None:
        raise RecipeError(problems)
    apply_overrides(root, overrides, Recipe, problems)
    _load_plugins(root, base_dir, problems)
    _expand_environment(root, shapes(Recipe), problems, os.environ)
    recipe = _validate(root, problems)
    if problems or recipe is None:
        problems.sort(key=_reading_order)
        raise RecipeError(problems)
    return recipe


def _reading_order(problem: Problem) -> tuple[bool, str, int, int]:
    """Command line first, then file by file from the top."""
    file, _, mark = problem.where.rpartition(":")
    file, _, line = file.rpartition(":")
    return (file != "", file, int(line), int(mark)) if line.isdecimal() and mark.isdecimal() else (False, "", 0, 0)


def read_tree(text: str, label: str, folder: Path, chain: tuple[Path, ...], problems: list[Problem]) -> Node | None:
    """One file's tree, merged over the one that it ``extends``; None when there is nothing to go on with."""
    root = parse(text, label, problems)
    if root is None:
        return None
    if not isinstance(root.value, dict):
        what = {type(None): "is empty", list: "is a list"}.get(type(root.value), "is a single value")
        problems.append(Problem(root.at, "", f"{what}: a recipe is a mapping with `name` and `stages`"))
        return None
    extends = root.value.pop("extends", None)
    if extends is None:
        return root
    if not isinstance(extends.value, str) or not extends.value:
        problems.append(Problem(extends.at, "extends", "must be one file or the name of a shipped recipe"))
        return None
    try:
        beside = folder / extends.value
        path = beside if beside.is_file() else find_recipe(beside if extends.value.endswith(_SUFFIXES) else extends.value)
    except (RecipeError, OSError, ValueError) as error:
        problems.append(Problem(extends.at, "extends", str(error)))
        return None
    if path.resolve() in chain:
        circle = " -> ".join(p.name for p in (*chain[chain.index(path.resolve()) :], path))
        problems.append(Problem(extends.at, "extends", f"recipes extend each other in a circle: {circle}"))
        return None
    parent_text = _read(path, problems)
    if parent_text is None:
        return None
    parent = read_tree(parent_text, _label(path), path.parent, (*chain, path.resolve()), problems)
    return None if parent is None else _merge(parent, root, shapes(Recipe))


def _merge(below: Node, above: Node, found: Shapes) -> Node:
    """Mappings merge key by key, anything else is replaced.

    Two mappings that stand for different things do not mix: a part of another ``kind``, and a reference ``{from: stage}`` where
    the options themselves could stand, are replaced whole.
    """
    if not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return above
    kinds = [node.value["kind"].value for node in (below, above) if "kind" in node.value]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        return above
    references = [set(node.value) == {"from"} for node in (below, above)]
    if references[0] != references[1] and any(isinstance(shape, ModelShape) and shape.cls is From for shape in found):
        return above
    merged = dict(below.value)
    kinded = above if "kind" in above.value else below
    for key, node in above.value.items():
        merged[key] = _merge(merged[key], node, _below(kinded, found, key)) if key in merged else node
    return Node(merged, above.at, above.key_at)


def _load_plugins(root: Node, base_dir: Path, problems: list[Problem]) -> None:
    try:
        load_entry_points()
    except LimbeckError as error:
        problems.append(Problem("", "", str(error)))
    names = root.value.get("plugins")
    for i, node in enumerate(names.value if names is not None and isinstance(names.value, list) else []):
        if isinstance(node.value, str):
            try:
                load_plugin(node.value, base_dir)
            except LimbeckError as error:
                problems.append(Problem(node.at, f"plugins.{i}", str(error)))


_VARIABLE = re.compile(r"\$\{([^{}]*)\}")


def _expand_environment(
    node: Node, found: Shapes, problems: list[Problem], environment: Mapping[str, str], path: str = ""
) -> None:
    """Replace ``${env:NAME}`` in fields that allow it, in place; elsewhere, and for a missing variable, it is a problem."""
    if isinstance(node.value, str):
        if any(isinstance(shape, ScalarShape) and shape.environment for shape in found):
            expanded = _expanded(node, path, problems, environment)
            if not any(isinstance(shape, ScalarShape) and shape.secret for shape in found):
                node.value = expanded
        elif "${env:" in node.value:
            problems.append(Problem(node.at, path, "${env:NAME} is for paths and secrets only: write the value here"))
        return
    for key, child, inner in _children(node, found):
        _expand_environment(child, inner, problems, environment, f"{path}.{key}".lstrip("."))


def _expanded(node: Node, path: str, problems: list[Problem], environment: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        scheme, _, name = match[1].partition(":")
        if scheme != "env" or not name:
            problems.append(Problem(node.at, path, f"cannot expand {match[0]}: environment variables are written ${{env:NAME}}"))
        elif name not in environment:
            hint = did_you_mean(name, environment) or ";"
            message = f"the environment variable {name} is not set{hint} export {name}=… before the run"
            problems.append(Problem(node.at, path, message))
        else:
            return environment[name]
        return match[0]

    return _VARIABLE.sub(value, node.value)


def _children(node: Node, found: Shapes) -> Iterator[tuple[str, Node, Shapes]]:
    """The nodes below one, with what their fields accept (nothing, where the key is unknown)."""
    if isinstance(node.value, list):
        items = [option for shape in found if isinstance(shape, ListShape) for option in shapes(shape.item)]
        yield from ((str(i), child, Shapes(tuple(items))) for i, child in enumerate(node.value))
    elif isinstance(node.value, dict):
        yield from ((key, child, _below(node, found, key)) for key, child in node.value.items())


def _below(node: Node, found: Shapes, key: str) -> Shapes:
    """What the value under one key of a mapping may be."""
    options: list[Shape] = []
    for shape in flat(found):
        cls = None
        if isinstance(shape, DictShape):
            options += shapes(shape.value)
        elif isinstance(shape, ModelShape):
            cls = shape.cls
        elif isinstance(shape, PartShape):
            cls = shape.options_of(_kind_only(node))
        if cls is not None and key in fields_of(cls):
            options += field_shapes(fields_of(cls)[key])
    return Shapes(tuple(options))


def _kind_only(node: Node) -> dict[str, Any]:
    kind = node.value.get("kind")
    return {} if kind is None else {"kind": kind.value}


def _validate(root: Node, problems: list[Problem]) -> Recipe | None:
    """The recipe, or None with problems; a place that already has one is not reported twice."""
    data, recipe, found = root.plain(), None, []
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        found = findings(Recipe, data, error.errors(include_url=False))
    reported = {finding.path for finding in found}
    found += [f for f in mistaken_scalars(shapes(Recipe), data) if f.path not in reported]
    taken = {problem.where for problem in problems}
    for finding in found:
        problem = _problem(root, finding)
        if problem.where not in taken or problem.where.startswith("override"):
            problems.append(problem)
    places = {".".join(map(str, path)): node for path, node in root.walk()}
    for problem in _stage_problems(root, recipe):
        keys = problem.path.split(".")
        while keys and ".".join(keys) not in places:
            keys.pop()
        problems.append(Problem(places[".".join(keys)].at if keys else root.at, problem.path, problem.message))
    problems[:] = dict.fromkeys(problems)
    return recipe


def _problem(root: Node, finding: Finding) -> Problem:
    return Problem(root.place(finding.path, finding.on_key), ".".join(map(str, finding.path)), finding.message)


def _stage_problems(root: Node, recipe: Recipe | None) -> list[Problem]:
    """What stages say about each other, also in a recipe that has other faults."""
    if recipe is not None:
        return stage_problems(recipe)
    stages = root.value.get("stages")
    if stages is None or not isinstance(stages.value, dict):
        return []
    return reference_problems({name: list(_written_references(node)) for name, node in stages.value.items()}, {})


def _written_references(node: Node) -> Iterator[tuple[str, str]]:
    """``references`` of a stage that does not validate: the words after ``from:`` and ``against:``."""
    for path, child in node.walk():
        named = bool(path) and (path[-1] == "from" or (len(path) == 2 and path[0] == "against"))
        if named and isinstance(child.value, str) and "config" not in path and child.value not in ("teacher", "copy_init"):
            yield ".".join(map(str, path)), child.value
