"""``limbeck ls``: what there is."""

from __future__ import annotations

from typing import Annotated

import typer

from limbeck import api
from limbeck.cli.complete import kind_names


def ls(
    kind: Annotated[
        str | None,
        typer.Argument(metavar="KIND", help="recipes, mixers, teachers …; all by default.", show_default=False, autocompletion=kind_names),
    ] = None,
) -> None:
    """List recipes and parts, plug-ins included.

    \b
    limbeck ls recipes
    limbeck ls mixers
    """
    for word, found in api.ls(kind).items():
        if kind is None:
            typer.echo(f"{word}:")
        width = max(map(len, found), default=0)
        for name, text in found.items():
            typer.echo(f"{'' if kind else '  '}{name:<{width}}  {text}")
