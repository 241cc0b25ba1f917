"""Export stages that ask for a GGUF file of a student that none can hold: said when the recipe is read, not after training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from limbeck.config.native import origin
from limbeck.errors import Problem

if TYPE_CHECKING:
    from limbeck.config.recipe import Recipe


def gguf_problems(recipe: Recipe) -> list[Problem]:
    """What is in the way of each such stage, by the reasons that the options of a surgery give (``foreign``)."""
    problems = []
    for name, stage in recipe.stages.items():
        if stage.kind != "export" or "gguf" not in stage.to or stage.from_ not in recipe.stages:
            continue
        student = origin(recipe, stage.from_)
        reasons = [getattr(surgery, "foreign", None) for surgery in (student.surgery if student is not None else ())]
        problems += [Problem("", f"stages.{name}.to", f"gguf: {reason}") for reason in reasons if reason]
    return problems
