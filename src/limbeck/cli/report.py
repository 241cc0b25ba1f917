"""``limbeck report``: a run as one self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]) -> None:
    """Write a run's report, one HTML page."""
    from limbeck.cli.console import say
    from limbeck.report.html import write_report

    say(f"report {write_report(run)}")
