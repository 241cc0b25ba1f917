"""``limbeck check``: is a recipe right, and what would it do?"""

from __future__ import annotations

import typer

from limbeck.cli.arguments import Overrides, RecipeArgument


def check(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Say what a recipe would do, or all that is wrong with it."""
    from limbeck.config.load import load_recipe
    from limbeck.config.summary import summarise

    typer.echo(summarise(load_recipe(recipe, overrides or ())))
