"""``limbeck check``: is a recipe right, and what would it do?"""

from __future__ import annotations

import typer

from limbeck import api
from limbeck.cli.arguments import Overrides, RecipeArgument


def check(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Say what a recipe would do, or all that is wrong with it.

    \b
    limbeck check my.yaml
    limbeck check hybrid align.loop.tokens=1M distil.loop.tokens=2M
    """
    summary, unchecked = api.check(recipe, *(overrides or ()))
    typer.echo(summary)
    for note in unchecked:
        typer.echo(f"\nnot checked: {note}")
