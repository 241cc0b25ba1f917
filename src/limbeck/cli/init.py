"""``limbeck init``: a recipe with every field explained."""

from __future__ import annotations

from typing import Annotated

import typer


def init(kind: Annotated[str, typer.Argument(help="A shipped recipe to start from: hybrid, pretrain …")]) -> None:
    """Print a recipe with every field explained."""
    from limbeck.config.template import template

    typer.echo(template(kind), nl=False)
