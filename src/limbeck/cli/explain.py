"""``limbeck explain``: one recipe, part or field."""

from __future__ import annotations

from typing import Annotated

import typer


def explain(name: Annotated[str, typer.Argument(help="A recipe, a part (swa, teacher.local) or a field (loop.tokens).")]) -> None:
    """Say what a recipe, a part or a field is."""
    from limbeck.config.explain import explain as text

    typer.echo(text(name))
