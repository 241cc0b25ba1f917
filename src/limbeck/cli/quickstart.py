"""``limbeck quickstart``: a real distillation on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from limbeck import api


def quickstart(
    directory: Annotated[Path, typer.Option(help="Where the run lives.")] = Path("runs/quickstart"),
    train_teacher: Annotated[bool, typer.Option("--train-teacher", help="Train the teacher too, from scratch.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A form of seconds, which shows the machinery and no quality.")] = False,
) -> None:
    """A real distillation on this machine, no downloads.

    \b
    limbeck quickstart
    limbeck quickstart --quick --directory runs/first
    """
    from limbeck.cli.console import say, terminal

    api.quickstart(directory, train_teacher=train_teacher, quick=quick, say=say, console=terminal())
