"""``limbeck init``: a recipe to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    kind: Annotated[
        str | None, typer.Argument(help="A shipped recipe to start from: hybrid, pretrain …", show_default=False)
    ] = None,
    from_seed: Annotated[
        list[Path] | None,
        typer.Option("--from-seed", metavar="FILE", help="Translate a config of fla-org/hybrid-distillation; once a stage.", show_default=False),
    ] = None,
) -> None:
    """Print a recipe: a shipped one with every field explained, or the translation of another project's configs."""
    from limbeck.errors import LimbeckError

    if (kind is None) == (not from_seed):
        from limbeck.config.load import shipped_recipes

        raise LimbeckError(f"init takes the name of a shipped recipe ({', '.join(shipped_recipes())}) or --from-seed FILE")
    if from_seed:
        from limbeck.config.from_seed import from_seed as translate

        text, notes = translate(from_seed)
        typer.echo(text, nl=False)
        for note in notes:
            typer.echo(f"limbeck: {note}", err=True)
        return
    from limbeck.config.template import template

    typer.echo(template(str(kind)), nl=False)
