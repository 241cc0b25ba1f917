"""``limbeck ls``: what there is."""

from __future__ import annotations

from typing import Annotated

import typer


def ls(
    kind: Annotated[str | None, typer.Argument(help="recipes, mixers, teachers …; all by default.", show_default=False)] = None,
) -> None:
    """List recipes and parts, plug-ins included."""
    from limbeck.config.explain import kinds, known

    for word in [kind] if kind else kinds():
        found = known(word)
        if kind is None:
            typer.echo(f"{word}:")
        width = max((len(name) for name, _ in found), default=0)
        for name, text in found:
            typer.echo(f"{'' if kind else '  '}{name:<{width}}  {text}")
