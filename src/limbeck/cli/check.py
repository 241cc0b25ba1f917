"""``limbeck check``: is a recipe right, and what would it do?"""

from __future__ import annotations

import typer

from limbeck.cli.arguments import Overrides, RecipeArgument


def check(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Say what a recipe would do, or all that is wrong with it."""
    from limbeck.config.load import load_recipe, recipe_folder
    from limbeck.config.native import native_exports
    from limbeck.config.summary import summarise
    from limbeck.config.trackers import check_trackers

    loaded = load_recipe(recipe, overrides or ())
    check_trackers(loaded)
    notes: list[str] = []
    if native_exports(loaded):
        # Reads the teacher's config, by transformers: seconds that other recipes need not pay.
        from limbeck.stages.native import check_native_teachers

        notes = check_native_teachers(loaded, recipe_folder(recipe))
    typer.echo(summarise(loaded))
    for note in notes:
        typer.echo(f"\nnot checked: {note}")
