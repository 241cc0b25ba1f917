"""How the command line looks and ends: help texts, and what a person sees when something is wrong."""

from __future__ import annotations

import errno
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from limbeck.errors import LimbeckError
from limbeck.interrupts import interruptible

USER_ERROR = 2
INTERRUPTED = 130
_PATIENCE = 20.0
"""Seconds for leaving a process group: a peer that died must not hold this process."""
SECTIONS = {
    "A recipe": ("init", "check", "plan", "prepare", "run"),
    "What a run left": ("report", "compare", "evaluate", "generate", "export", "serve"),
    "Teachers": ("teach", "signals"),
    "Front ends and parts by hand": ("quickstart", "distill-ternary", "adapters", "lm_eval"),
    "Looking things up": ("ls", "explain", "schema", "doctor"),
}
"""How the verbs stand in the root's help."""
_TYPES = {"str": "TEXT", "int": "N", "float": "X", "path": "PATH", "file": "FILE", "dir": "FOLDER"}


_MENDABLE = {
    errno.ENOSPC: "free some space, or name a place on another disk; what was saved is whole, and the same command goes on",
    errno.EDQUOT: "free some of your quota, or name another place; what was saved is whole, and the same command goes on",
    errno.EACCES: "give yourself the right to it, or name another place",
    errno.EPERM: "give yourself the right to it, or name another place",
    errno.EROFS: "name a place that can be written to",
    errno.ENAMETOOLONG: "take a shorter name",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
}
"""Errors of the system that come from anywhere, and their ways out.  Others would be our bugs."""
_PLAIN = {
    "Input should be": "must be",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}
"""What typer says of a value that does not fit, and what we say."""


class Verb(TyperCommand):
    """A verb whose help says ``RECIPE [KEY=VALUE]...`` and ``--port N``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The words of a command line, with plainer words about values that do not fit."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ").partition(", unable to parse")[0]
            for theirs, plain in _PLAIN.items():
                error.message = error.message.replace(theirs, plain)
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Words of the usage line: braces say nothing that brackets do not."""
        return [re.sub(r"^\{(.*)\}(\.\.\.)?$", r"\1\2", piece) for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments and options, each with a word for what it takes."""
        rows: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                argument = param.param_type_name == "argument"
                name = re.sub(r" <[^<>]*>$", "", record[0]) if argument else re.sub(r"<([^<>]*)>", _type, record[0])
                rows["Arguments" if argument else "Options"].append((name, record[1]))
        for title, records in rows.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def _type(found: re.Match[str]) -> str:
    word = found[1].removeprefix("list[").removesuffix("]").removesuffix(" range")
    return _TYPES.get(word, word)


def _say_last(text: str) -> None:
    """To stderr, if somebody still hears it: the exit code is for those who do not."""
    with suppress(OSError):
        typer.echo(text, err=True)


class Verbs(TyperGroup):
    """The application: help in sections, and errors meant for people as their message and an exit code; anything else is a bug and keeps its
    traceback."""

    def invoke(self, ctx: Any) -> Any:
        """What the verb returns.  Raises ``typer.Exit`` with the code that the process ends with."""
        try:
            with interruptible(), group_left():
                return super().invoke(ctx)
        except LimbeckError as error:
            _say_last(f"limbeck: {error}" if "\n" not in str(error) else f"limbeck:\n{error}")
            raise typer.Exit(USER_ERROR) from error
        except OSError as error:
            if error.errno not in _MENDABLE:
                raise
            where = f"{error.filename}: " if error.filename else ""
            _say_last(f"limbeck: {where}{error.strerror}: {_MENDABLE[error.errno]}")
            raise typer.Exit(USER_ERROR) from error
        except KeyboardInterrupt as error:
            _say_last("\nlimbeck: interrupted; the same command goes on where it stopped")
            raise typer.Exit(INTERRUPTED) from error

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The verbs, by what they are for."""
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(200)) for name in names])


@contextmanager
def group_left() -> Iterator[None]:
    """Leave the process group that a verb has joined, after the verb has written down how it ended."""
    before = _group()
    try:
        yield
    finally:
        group = _group()
        if group is not None and before is None:
            leaving = threading.Thread(target=group.destroy_process_group, daemon=True)
            leaving.start()
            leaving.join(_PATIENCE)


def _group() -> Any:
    """torch.distributed, if somebody has imported it and joined a group."""
    distributed = sys.modules.get("torch.distributed")
    joined = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if joined else None
