"""``limbeck compare``: runs, stages and cells of grids side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from limbeck import api


def compare(
    things: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN", help="Two or more: RUN, RUN/STAGE, RUN/STAGE/grid/CELL; a stage with a grid is all its cells."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The page, one HTML file.")] = Path("compare.html"),
    by: Annotated[str, typer.Option(help="What curves run over: tokens or steps.")] = "tokens",
) -> None:
    """Put runs side by side: settings, curves, evaluations.

    \b
    limbeck compare runs/a runs/b
    limbeck compare runs/a/distil runs/b/distil --out side_by_side.html --by steps

    Also their sizes and speeds, what cannot be compared, and what differs in nothing but its seed.
    """
    from limbeck.cli.console import say
    from limbeck.report.compare import tables

    for table in tables(api.compare(*things, out=out, by=by)):
        say(table)
    say(f"comparison {out}")
