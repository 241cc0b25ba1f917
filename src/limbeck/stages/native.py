"""Whether the teacher of a native export fits, asked before anything trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.config.native import base_of, native_exports, teacher_obstacles
from limbeck.config.recipe import Recipe
from limbeck.errors import ModelError, Problem, RecipeError
from limbeck.models.loading import load_config, resolve_source


def check_native_teachers(recipe: Recipe, recipe_dir: Path) -> list[str]:
    """Refuse (:class:`RecipeError`) native exports of teachers that Qwen3.5 has no place for.

    Returns a line for each base whose config cannot be read from here; the export itself will look again.
    """
    problems, unread = [], []
    for name in native_exports(recipe):
        base = base_of(recipe, recipe.stages[name].from_)
        config: dict[str, Any]
        if base is None:
            continue
        if isinstance(base, str):
            try:
                config = load_config(resolve_source(base, recipe_dir)).to_dict()
            except ModelError as error:
                unread.append(f"{name}: whether {base} fits `to: native` cannot be said: {error}")
                continue
            what = base
        else:
            config, what = base, "the model from scratch"
        problems += [Problem("", f"stages.{name}.to", f"native: {what} is refused: {obstacle}") for obstacle in teacher_obstacles(config)]
    if problems:
        raise RecipeError(problems)
    return unread
