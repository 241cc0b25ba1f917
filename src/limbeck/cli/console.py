"""How verbs speak: plain lines to stdout, tables where a room hands one over."""

from __future__ import annotations

import io
import sys
from functools import cache
from typing import Any

from rich.console import Console
from rich.text import Text

from limbeck.engine.screen import regardless


@cache
def terminal() -> Console:
    """Where a verb prints.

    A live view needs a terminal: variables that ask for colours in a pipe or a CI log (``FORCE_COLOR``) are no word for one.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal cannot show must not end a run.
        sys.stdout.reconfigure(errors="replace")
    real = sys.stdout is not None and sys.stdout.isatty()
    return Console(highlight=False, soft_wrap=True, force_interactive=None if real else False)


def say(thing: Any) -> None:
    """Print a line as it is (brackets are no markup), or a rich table.  Work goes on where nobody reads it any more."""
    with regardless(terminal()):
        terminal().print(Text(thing) if isinstance(thing, str) else thing)
