"""``limbeck quickstart``: a real distillation on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    directory: Annotated[Path, typer.Option(help="Where the run lives.")] = Path("runs/quickstart"),
    train_teacher: Annotated[bool, typer.Option("--train-teacher", help="Train the teacher too, from scratch.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A form of seconds, which shows the machinery and no quality.")] = False,
) -> None:
    """A real distillation on this machine, no downloads."""
    from limbeck.cli.console import say, terminal
    from limbeck.stages.quickstart import quickstart as distil

    distil(directory=directory, train_teacher=train_teacher, quick=quick, say=say, console=terminal())
