"""The recipe: named stages, and what is checked between them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator

from limbeck.config.base import From, Options, PartOf
from limbeck.config.gguf import gguf_problems
from limbeck.config.matching import matching_problems
from limbeck.config.native import native_problems
from limbeck.config.parts.stages import STAGES
from limbeck.config.ranking import ranking_problems
from limbeck.errors import Problem, did_you_mean

CONDITION_STAGES = ("prepare_conditions", "prepare_trajectories")
"""Kinds of stages that make conditions."""
_WITHOUT_MODEL = ("prepare", "evaluate", "capture", "rank_layers", *CONDITION_STAGES, "train_adapters", "measure_deltas", "evaluate_adapters", "evaluate_agent")
_WITHOUT_DATA = ("evaluate", "export", "rank_layers", "train_adapters", "measure_deltas", "evaluate_adapters", "evaluate_agent")
_MAKERS = {
    "signals": (("capture",), "makes no signals"),
    "keep": (("rank_layers",), "ranks no layers"),
    "pool": (("train_adapters",), "trains no pool of adapters"),
    "deltas": (("measure_deltas",), "measures no deltas"),
    "conditions": (CONDITION_STAGES, "makes no conditions"),
}
"""The last word of a path before `.from` -> the kinds of stages that make what it names, and what is wrong with another."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Recipe(Options):
    """A YAML file with named stages.  `limbeck run` does what is not done yet and stops."""

    name: str
    """Name of the run: its folder under `runs/`."""
    description: str = ""
    """One line for `limbeck ls recipes` and the report."""
    plugins: tuple[str, ...] = ()
    """Python modules (or .py files beside the recipe) that register parts of their own."""
    stages: dict[str, Annotated[Any, PartOf(STAGES, "train")]] = Field(min_length=1)
    """Stages by name; each may name earlier ones by `from`."""

    @cached_property
    def folder(self) -> Path:
        """Where its relative paths start: its file's folder (set by `load_recipe`), the working directory for any other.  No part of its value."""
        return Path.cwd()

    @field_validator("name")
    @classmethod
    def _safe_name(cls, value: str, info: ValidationInfo) -> str:
        if not NAME.fullmatch(value):
            raise ValueError(f"{value!r} cannot name a folder: letters, digits, '.', '_' and '-', at most 64, no leading dot")
        return value


def references(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every ``(path, stage)`` that a stage's options refer to, wherever it stands."""
    if isinstance(value, From):
        yield (f"{path}.from" if path else "from"), value.from_
    elif isinstance(value, Options):
        for name in type(value).model_fields:
            item = getattr(value, name)
            if name == "from_" and isinstance(item, str):
                yield (f"{path}.from" if path else "from"), item
            elif name == "grid":
                # A cell may read another stage: `teacher.deltas.from: [deltas_5, deltas_20]`.
                swept = [(key, values) for key, values in item.items() if key.rsplit(".", 1)[-1] == "from"]
                yield from ((key, value) for key, values in swept for value in values if isinstance(value, str))
            elif name in ("against", "predictors"):
                for i, other in enumerate(item):
                    if other not in ("teacher", "copy_init"):
                        yield f"{path}.{name}.{i}".lstrip("."), other
            else:
                yield from references(item, f"{path}.{name}".lstrip("."))
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from references(item, f"{path}.{name}".lstrip("."))
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from references(item, f"{path}.{i}".lstrip("."))


def stage_problems(recipe: Recipe) -> list[Problem]:
    """References to stages that do not exist or make nothing of use, and cycles; a path is relative to the recipe's root."""
    edges = {name: list(references(stage)) for name, stage in recipe.stages.items()}
    problems = reference_problems(edges, {name: stage.kind for name, stage in recipe.stages.items()})
    for name, found in edges.items():
        for path, target in found:
            if target in recipe.stages and recipe.stages[target].grid and not path.startswith("data"):
                message = f"stage {target!r} has a grid, so it is several results, not one: name a stage without a grid"
                problems.append(Problem("", f"stages.{name}.{path}", message))
        problems += signal_problems(recipe, name)
    return problems + checkpoint_problems(recipe) + native_problems(recipe) + gguf_problems(recipe) + ranking_problems(recipe) + matching_problems(recipe)


def checkpoint_problems(recipe: Recipe) -> list[Problem]:
    """Stages that would find each other's checkpoints."""
    first: dict[str, str] = {}
    problems = []
    for name, stage in recipe.stages.items():
        place = getattr(getattr(stage, "loop", None), "checkpoints", None)
        if place is not None and (other := first.setdefault(place, name)) != name:
            message = f"stage {other!r} keeps its checkpoints in {place!r} too: give each stage a folder of its own"
            problems.append(Problem("", f"stages.{name}.loop.checkpoints", message))
    return problems


def signal_problems(recipe: Recipe, name: str) -> list[Problem]:
    """What a stage's objectives need and the capture stage whose signals it reads does not store."""
    stage = recipe.stages[name]
    signals = getattr(getattr(stage, "teacher", None), "signals", None)
    if not isinstance(signals, From) or getattr(recipe.stages.get(signals.from_), "kind", None) != "capture":
        return []
    capture = recipe.stages[signals.from_]
    answers = [(o, capture.provides(need)) for o in getattr(stage, "objectives", ()) for need in o.needs()]
    return [
        Problem("", f"stages.{name}.teacher.signals", f"objective '{objective.kind}' needs {answer} by stage {signals.from_!r}: change one of them")
        for objective, answer in answers
        if answer is not True
    ]


def reference_problems(edges: dict[str, list[tuple[str, str]]], kinds: dict[str, str]) -> list[Problem]:
    """:func:`stage_problems` of bare references, ``edges[stage] = [(path within the stage, stage it names), ...]``.

    ``kinds`` holds the kind of each stage where it is known.
    """
    problems = []
    for name, found in edges.items():
        if not NAME.fullmatch(name):
            problems.append(Problem("", f"stages.{name}", "a stage's name is letters, digits, '.', '_' and '-', no leading dot"))
        for path, target in found:
            if target not in edges:
                hint = did_you_mean(target, edges) or ";"
                message = f"no stage named {target!r}{hint} stages: {', '.join(edges)}"
                problems.append(Problem("", f"stages.{name}.{path}", message))
            elif (word := path.removesuffix(".from").rsplit(".", 1)[-1]) in _MAKERS:
                makers, lack = _MAKERS[word]
                if (kind := kinds.get(target)) not in (*makers, None):
                    problems.append(Problem("", f"stages.{name}.{path}", f"stage {target!r} is of kind {kind}: it {lack}; name a {' or '.join(makers)} stage"))
            elif kinds.get(name) == "rank_layers" and path == "from" and kinds.get(target) not in ("train", None):
                message = f"stage {target!r} is of kind {kinds[target]}: name the train stage whose student has the mixers"
                problems.append(Problem("", f"stages.{name}.{path}", message))
            elif (kind := kinds.get(target)) in _WITHOUT_MODEL and not path.startswith("data") and (kind, path) != ("prepare", "tokenizer.from"):
                problems.append(Problem("", f"stages.{name}.{path}", f"stage {target!r} is of kind {kind}: it makes no model; name a train stage"))
            elif kind in _WITHOUT_DATA and path == "data.from":
                problems.append(Problem("", f"stages.{name}.{path}", f"stage {target!r} is of kind {kind}: it prepares no data; name a prepare or train stage"))
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            circle = " -> ".join([*trail[trail.index(name) :], name])
            problems.append(Problem("", f"stages.{name}", f"stages refer to each other in a circle: {circle}; take one of these references out"))
        elif name not in done:
            for _, target in edges.get(name, ()):
                walk(target, (*trail, name))
            done.add(name)

    for name in edges:
        walk(name, ())
    return problems


def stage_order(recipe: Recipe, last: str | None = None) -> list[str]:
    """Stages so that each comes after the ones it names, otherwise as written; with ``last`` that one and what it reads, alone."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name not in order:
            for _, target in references(recipe.stages[name]):
                visit(target)
            order.append(name)

    for name in recipe.stages if last is None else (last,):
        visit(name)
    return order
