"""The application: verbs, and what a person sees when something is wrong."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from limbeck import __version__
from limbeck.cli.adapters import adapters
from limbeck.cli.check import check
from limbeck.cli.compare import compare
from limbeck.cli.distill_ternary import distill_ternary
from limbeck.cli.doctor import doctor
from limbeck.cli.evaluate import evaluate
from limbeck.cli.explain import explain
from limbeck.cli.export import export
from limbeck.cli.generate import generate
from limbeck.cli.init import init
from limbeck.cli.lm_eval import lm_eval
from limbeck.cli.ls import ls
from limbeck.cli.plan import plan
from limbeck.cli.prepare import prepare
from limbeck.cli.quickstart import quickstart
from limbeck.cli.report import report
from limbeck.cli.run import run
from limbeck.cli.schema import schema
from limbeck.cli.serve import serve
from limbeck.cli.signals import signals
from limbeck.cli.teach import teach
from limbeck.errors import LimbeckError
from limbeck.interrupts import interruptible

USER_ERROR = 2
INTERRUPTED = 130
_PATIENCE = 20.0
"""Seconds for leaving a process group: a peer that died must not hold this process."""


@contextmanager
def _group_left() -> Iterator[None]:
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


class _Verbs(TyperGroup):
    """Turns errors meant for people into their message and an exit code; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with interruptible(), _group_left():
                return super().invoke(ctx)
        except LimbeckError as error:
            typer.echo(f"limbeck: {error}" if "\n" not in str(error) else f"limbeck:\n{error}", err=True)
            raise typer.Exit(USER_ERROR) from error
        except KeyboardInterrupt as error:
            typer.echo("\nlimbeck: interrupted; the same command goes on where it stopped", err=True)
            raise typer.Exit(INTERRUPTED) from error

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order in which they were added, first what one needs first, and verbs before groups of verbs."""
        return sorted(self.commands, key=lambda name: isinstance(self.commands[name], TyperGroup))


app = typer.Typer(
    cls=_Verbs, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Distil large language models into something cheaper to run.",
)  # fmt: skip
for verb in (
    quickstart, init, check, plan, run, prepare, report, compare, evaluate, generate, export, serve, teach, distill_ternary, signals, ls, explain,
    schema, doctor,
):  # fmt: skip
    app.command()(verb)
# Every word is the harness's, --help too.
app.command("lm_eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": [], "allow_interspersed_args": False})(
    lm_eval
)
app.add_typer(adapters, name="adapters")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"limbeck {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="limbeck")
