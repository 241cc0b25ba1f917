"""``limbeck init``: a recipe to start from, or a script that runs one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck import api
from limbeck.cli.complete import recipe_names
from limbeck.errors import LimbeckError

_ASKED = "With --slurm: "


def init(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="A shipped recipe to start from: hybrid, pretrain …; with --slurm, a recipe or its file.", show_default=False,
            autocompletion=recipe_names,
        ),
    ] = None,
    from_seed: Annotated[
        list[Path] | None,
        typer.Option("--from-seed", metavar="FILE", help="Translate a config of fla-org/hybrid-distillation; once a stage.", show_default=False),
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Print the script that runs the recipe under sbatch or bash.")] = False,
    verb: Annotated[
        str | None,
        typer.Option(help=f"{_ASKED}run (default); or prepare, capture (every capture stage), report: these without GPUs.", show_default=False),
    ] = None,
    stage: Annotated[str | None, typer.Option(help=f"{_ASKED}only this stage.", show_default=False)] = None,
    nodes: Annotated[int | None, typer.Option(help=f"{_ASKED}nodes (1).", show_default=False)] = None,
    gpus: Annotated[int | None, typer.Option(help=f"{_ASKED}GPUs of a node (8), one process each; 0 is --cpu.", show_default=False)] = None,
    cpus: Annotated[int | None, typer.Option(help=f"{_ASKED}CPU cores of a node (8 a GPU).", show_default=False)] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help=f"{_ASKED}no GPUs, one process.")] = False,
    time: Annotated[str | None, typer.Option(help=f"{_ASKED}time of one start, HH:MM:SS (24:00:00).", show_default=False)] = None,
) -> None:
    """Print a recipe with every field explained, or a job script.

    \b
    limbeck init hybrid > my.yaml
    limbeck init --slurm my.yaml --nodes 2 --time 12:00:00 > job.sbatch
    limbeck init --from-seed stage1.yaml --from-seed stage2.yaml > mine.yaml
    """
    asked = {"verb": verb, "stage": stage, "nodes": nodes, "gpus": gpus, "cpus": cpus, "time": time}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if slurm:
        if kind is None or from_seed:
            raise LimbeckError("init --slurm takes a recipe's file, or the name of a shipped one: limbeck init --slurm my.yaml > job.sbatch")
        if cpu and gpus:
            raise LimbeckError(f"--cpu and --gpus {gpus}: one of them")
        typer.echo(api.slurm_script(kind, api.Job(**(given | {"gpus": 0} if cpu else given))), nl=False)
    elif given or cpu:
        raise LimbeckError(f"--{next(iter(given), 'cpu')} is about a job: add --slurm")
    elif (kind is None) == (not from_seed):
        names = ", ".join(api.ls("recipes")["recipes"])
        raise LimbeckError(f"init takes the name of a shipped recipe ({names}) or --from-seed FILE")
    elif from_seed:
        text, notes = api.from_seed(*from_seed)
        typer.echo(text, nl=False)
        for note in notes:
            typer.echo(f"limbeck: {note}", err=True)
    else:
        typer.echo(api.template(str(kind)), nl=False)
