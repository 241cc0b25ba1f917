"""What the trackers of a recipe lack on this machine: told by ``limbeck check`` and before a run starts, not when a record is read again."""

from __future__ import annotations

from limbeck.config.recipe import Recipe
from limbeck.errors import Problem, RecipeError


def check_trackers(recipe: Recipe) -> None:
    """Refuse a recipe of which a tracker's package or account is missing here.

    Raises:
        RecipeError: all that is missing, each with its field and the way out.
    """
    problems = [
        Problem("", f"stages.{name}.loop.trackers.{i}", lack)
        for name, stage in recipe.stages.items()
        for i, tracker in enumerate(getattr(getattr(stage, "loop", None), "trackers", ()))
        if (lack := tracker.lacking()) is not None
    ]
    if problems:
        raise RecipeError(problems)
