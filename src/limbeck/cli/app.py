"""The application: its verbs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from limbeck import __version__
from limbeck.cli import adapters as by_hand
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
from limbeck.cli.manners import Verb, Verbs
from limbeck.cli.plan import plan
from limbeck.cli.prepare import prepare
from limbeck.cli.quickstart import quickstart
from limbeck.cli.report import report
from limbeck.cli.run import run
from limbeck.cli.schema import schema
from limbeck.cli.serve import serve
from limbeck.cli.signals import signals
from limbeck.cli.teach import teach

HELP = """Distil large language models into something cheaper to run.

\b
limbeck quickstart               a real distillation on this machine, in minutes
limbeck init hybrid > my.yaml    a recipe to start from, every field explained
limbeck check my.yaml            what it would do, or every mistake at once
limbeck plan my.yaml             memory, time and disk before a GPU is rented
limbeck run my.yaml              do it; again to go on where it stopped

`limbeck VERB --help` shows options and examples.
"""

app = typer.Typer(cls=Verbs, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, help=HELP)
for verb in (
    quickstart, init, check, plan, run, prepare, report, compare, evaluate, generate, export, serve, teach, distill_ternary, signals, ls, explain,
    schema, doctor,
):  # fmt: skip
    app.command(cls=Verb)(verb)
# Every word is the harness's, --help too.
app.command(
    "lm_eval", cls=Verb,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": [], "allow_interspersed_args": False},
)(lm_eval)  # fmt: skip
adapters = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Show, merge and search LoRA adapters (PEFT folders).")
adapters.command(cls=Verb)(by_hand.show)
adapters.command(cls=Verb)(by_hand.merge)
adapters.command(cls=Verb)(by_hand.retrieve)
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


def _hold_descriptors() -> None:
    """Put nothing in the place of a closed stdin, stdout or stderr (``>&-``): the next file would get its number, and what libraries print."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest number that is free is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def main() -> None:
    """Entry point of the console script."""
    _hold_descriptors()
    app(prog_name="limbeck")
