"""``limbeck run``: do what a recipe says and is not done yet."""

from __future__ import annotations

from typing import Annotated

import typer

from limbeck import api
from limbeck.cli.arguments import Overrides, RecipeArgument, RunDir, StageOption


def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    stage: StageOption = None,
    candidate: Annotated[
        int | None,
        typer.Option(help="Only this layer as a candidate of a rank_layers stage, on its own; see `limbeck explain rank_layers`.", show_default=False),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Set aside what is there and start anew.")] = False,
    run_dir: RunDir = None,
) -> None:
    """Do what a recipe says and is not done yet.

    \b
    limbeck run my.yaml
    limbeck run hybrid distil.loop.tokens=200k --run-dir runs/short
    limbeck run my.yaml --stage evaluate --fresh
    torchrun --nproc-per-node 8 -m limbeck run my.yaml

    The same command goes on where it stopped.  Ctrl-C saves a checkpoint and ends with exit code 130.
    """
    from limbeck.cli.console import say, terminal

    changes = overrides or ()
    if candidate is not None:
        api.run_candidate(recipe, candidate, *changes, run_dir=run_dir, stage=stage, say=say)
        return
    done = api.run(recipe, *changes, run_dir=run_dir, stage=stage, fresh=fresh, say=say, console=terminal())
    say(f"run in {done.path}")
