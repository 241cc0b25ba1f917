"""How verbs speak: plain lines to stdout, tables where a room hands one over."""

from __future__ import annotations

from functools import cache
from typing import Any

from rich.console import Console
from rich.text import Text


@cache
def terminal() -> Console:
    """Where a verb prints."""
    return Console(highlight=False, soft_wrap=True)


def say(thing: Any) -> None:
    """Print a line as it is (brackets are no markup), or a rich table."""
    terminal().print(Text(thing) if isinstance(thing, str) else thing)
