"""``limbeck prepare``: a recipe's text, on a machine without a GPU."""

from __future__ import annotations

from limbeck import api
from limbeck.cli.arguments import Overrides, RecipeArgument, RunDir


def prepare(recipe: RecipeArgument, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Prepare a recipe's text: no model, no GPU.

    \b
    limbeck prepare my.yaml
    limbeck prepare hybrid align.data.sequence=256 --run-dir runs/short

    `limbeck run` with the same run directory finds it there.
    """
    from limbeck.cli.console import say

    say(f"prepared in {api.prepare(recipe, *(overrides or ()), run_dir=run_dir, say=say)}")
