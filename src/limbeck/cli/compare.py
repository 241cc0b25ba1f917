"""``limbeck compare``: runs, stages and cells of grids side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    things: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Two or more: RUN, RUN/STAGE, RUN/STAGE/grid/CELL; a stage with a grid is all its cells.")
    ],
    out: Annotated[Path, typer.Option(help="The page, one HTML file.")] = Path("compare.html"),
    by: Annotated[str, typer.Option(help="What curves run over: tokens or steps.")] = "tokens",
) -> None:
    """Put runs side by side: what differs in their recipes, curves, evaluations, size and speed, seeds."""
    from limbeck.cli.console import say
    from limbeck.errors import RunError, did_you_mean
    from limbeck.report.compare import compare as compared
    from limbeck.report.compare import tables
    from limbeck.report.compare_page import AXES, write_comparison
    from limbeck.report.entries import read_entries

    if by not in AXES:
        raise RunError(f"--by {by}: curves run over no such thing{did_you_mean(by, AXES) or ';'} allowed: {', '.join(AXES)}")
    comparison = compared(read_entries(things))
    for table in tables(comparison):
        say(table)
    say(f"comparison {write_comparison(comparison, out, axis=by)}")
