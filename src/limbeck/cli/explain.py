"""``limbeck explain``: one recipe, part or field."""

from __future__ import annotations

from typing import Annotated

import typer

from limbeck import api
from limbeck.cli.complete import explained_names


def explain(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A recipe, a part (swa, teacher.local) or a field (loop.tokens).", autocompletion=explained_names)
    ],
) -> None:
    """Say what a recipe, a part or a field is.

    \b
    limbeck explain hybrid
    limbeck explain teacher.http
    limbeck explain loop.batch_tokens
    """
    typer.echo(api.explain(name))
