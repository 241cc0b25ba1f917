"""Stages that match teachers' adapters in a way that cannot work: said when the recipe is read, not after the teachers are trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from limbeck.config.base import From
from limbeck.config.native import origin
from limbeck.config.parts.objectives import DeltaObjectiveOptions
from limbeck.errors import Problem

if TYPE_CHECKING:
    from limbeck.config.recipe import Recipe

FACTORS = ("mse", "canonical")
"""Losses of `weights` that compare A and B, not what they multiply to."""


def matching_problems(recipe: Recipe) -> list[Problem]:
    """Predictors of deltas under other losses, and factors that are compared with those of another rank or scale."""
    problems: list[Problem] = []
    for name, stage in recipe.stages.items():
        # A cell of a grid may change what is compared here; it finds out when it runs.
        if stage.kind != "train" or any(path.startswith(("student", "teacher", "objectives")) for path in stage.grid):
            continue
        student = origin(recipe, name)
        for surgery in student.surgery if student is not None else ():
            if surgery.kind == "delta_predictor":
                problems += _not_for_predictors(name, stage)
            if surgery.kind == "lora_generator":
                problems += _other_factors(recipe, name, stage, surgery)
    return problems


def _not_for_predictors(name: str, stage: Any) -> Iterator[Problem]:
    # A plug-in's objective may know what to do with a predicted delta.
    built_in = DeltaObjectiveOptions.__module__
    for i, objective in enumerate(stage.objectives):
        if type(objective).__module__ == built_in and not isinstance(objective, DeltaObjectiveOptions):
            message = f"'delta_predictor' makes no model that '{objective.kind}' could run: its objective is `delta`"
            yield Problem("", f"stages.{name}.objectives.{i}", message)


def _other_factors(recipe: Recipe, name: str, stage: Any, surgery: Any) -> Iterator[Problem]:
    named = getattr(stage.teacher, "pool", None)
    if not isinstance(named, From):
        return
    pool = recipe.stages.get(named.from_)
    if pool is None or pool.kind != "train_adapters" or pool.mode != "lora" or pool.grid:
        return
    for i, objective in enumerate(stage.objectives):
        if objective.kind == "weights" and objective.loss in FACTORS and _shape(surgery) != _shape(pool.adapters):
            message = (
                f"'{objective.loss}' compares A and B, and the generator's ({_words(surgery)}) are not of the shape of its teachers' in stage "
                f"'{named.from_}' ({_words(pool.adapters)}): give both the same, or set `loss: product`"
            )
            yield Problem("", f"stages.{name}.objectives.{i}.loss", message)


def _shape(options: Any) -> tuple[int, float, bool]:
    return options.rank, options.alpha, options.rslora


def _words(options: Any) -> str:
    return f"rank {options.rank}, alpha {options.alpha:g}{', rslora' if options.rslora else ''}"
