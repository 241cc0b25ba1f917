"""``limbeck report``: a run as one self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from limbeck import api


def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]) -> None:
    """Write a run's report, one HTML page, and its model card.

    \b
    limbeck report runs/hybrid

    Both are written into the run's folder: report.html and model_card.md.
    """
    from limbeck.cli.console import say
    from limbeck.report.html import CARD

    page = api.write_report(run)
    say(f"report {page}\nmodel card {page.with_name(CARD)}")
