"""``limbeck run``: do what a recipe says and is not done yet."""

from __future__ import annotations

from typing import Annotated

import typer

from limbeck.cli.arguments import Overrides, RecipeArgument, RunDir


def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Only this stage; its inputs must be done.", show_default=False)] = None,
    candidate: Annotated[
        int | None,
        typer.Option(help="Only this layer as a candidate of a rank_layers stage, on its own; see `limbeck explain rank_layers`.", show_default=False),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Set aside what is there and start anew.")] = False,
    run_dir: RunDir = None,
) -> None:
    """Do what a recipe says and is not done yet."""
    from limbeck.cli.console import say, terminal
    from limbeck.config.load import load_recipe, recipe_folder

    loaded = load_recipe(recipe, overrides or ())
    from limbeck.stages.native import check_native_teachers
    from limbeck.stages.run import run_recipe

    here = recipe_folder(recipe)
    for note in check_native_teachers(loaded, here):
        say(f"not checked: {note}")
    if candidate is not None:
        from limbeck.stages.candidate import run_candidate

        run_candidate(loaded, candidate, recipe_dir=here, run_dir=run_dir, stage=stage, say=say)
        return
    folder = run_recipe(loaded, recipe_dir=here, run_dir=run_dir, stage=stage, fresh=fresh, say=say, console=terminal())
    say(f"run in {folder}")
