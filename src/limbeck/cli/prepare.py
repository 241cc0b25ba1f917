"""``limbeck prepare``: a recipe's text, on a machine without a GPU."""

from __future__ import annotations

from limbeck.cli.arguments import Overrides, RecipeArgument, RunDir


def prepare(recipe: RecipeArgument, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Prepare a recipe's text: no model, no GPU."""
    from limbeck.cli.console import say
    from limbeck.config.load import load_recipe, recipe_folder

    loaded = load_recipe(recipe, overrides or ())
    from limbeck.stages.run import prepare_recipe

    say(f"prepared in {prepare_recipe(loaded, recipe_dir=recipe_folder(recipe), run_dir=run_dir, say=say)}")
