"""``limbeck plan``: memory, time, wire and disk, before a GPU is rented."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated

import typer

from limbeck import api
from limbeck.cli.arguments import Overrides
from limbeck.cli.complete import device_names, recipe_names, stage_names
from limbeck.errors import LimbeckError

DOES_NOT_FIT = 1
PIPED = 240
"""Columns where no terminal says how many."""


def plan(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_MODEL", help="A recipe (file or shipped name), a model's folder, config.json or name.", autocompletion=recipe_names
        ),
    ],
    overrides: Overrides = None,
    device: Annotated[str, typer.Option(help="h100, h200, a100, b200, l40s, rtx4090 or cpu.", autocompletion=device_names)] = "h100",
    gpus: Annotated[int, typer.Option(min=1, max=65536, help="How many: ranks of training, GPUs of a served model.")] = 1,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of each, such as 141GB, in place of the table's.", show_default=False)
    ] = None,
    peak: Annotated[float | None, typer.Option(min=0.001, help="TFLOP/s of each in bfloat16, in place of the table's.", show_default=False)] = None,
    bandwidth: Annotated[float | None, typer.Option(min=0.001, help="TB/s of its memory, in place of the table's.", show_default=False)] = None,
    usable: Annotated[float, typer.Option(min=0.1, max=1.0, help="Share of the memory that is planned with.")] = 0.9,
    mfu: Annotated[float, typer.Option(min=0.001, max=1.0, help="Share of the peak that is reached.")] = 0.4,
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor parallel, of a served model.", show_default=False)] = None,
    ep: Annotated[int | None, typer.Option(min=1, help="Expert parallel, of a served model.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="Served weights: fp32, bf16, fp8 or int4.", show_default=False)] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of a served sequence; the model's most by default.", show_default=False)] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences served at a time.")] = 1,
    tokens: Annotated[str | None, typer.Option(help="Tokens of one pass over the text, such as 0.9B.", show_default=False)] = None,
    teacher_rate: Annotated[str | None, typer.Option(help="Tokens a second that a served teacher scores, such as 28k.", show_default=False)] = None,
    disk: Annotated[str | None, typer.Option(metavar="SIZE", help="Free disk for checkpoints and signals.", show_default=False)] = None,
    config: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="config.json of a model that is not known.", show_default=False)
    ] = None,
    stage: Annotated[str | None, typer.Option(help="One stage alone.", show_default=False, autocompletion=stage_names)] = None,
    brief: Annotated[bool, typer.Option("--brief", help="Without the details of each stage.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    """Memory, time and disk of a recipe or a model, on paper.

    \b
    limbeck plan my.yaml --device h100
    limbeck plan agentic_lora --device h200 --gpus 8 --brief
    limbeck plan Qwen3-Coder-Next --device h100 --gpus 4 --dtype fp8

    Ends with exit code 1 if it does not fit.  Loads no torch.
    """
    made = api.plan(
        what, *(overrides or ()), device=device, gpus=gpus, memory=memory, peak=peak, bandwidth=bandwidth, usable=usable, mfu=mfu, tp=tp, ep=ep,
        dtype=dtype, context=context, sequences=sequences, tokens=tokens, teacher_rate=teacher_rate, disk=disk, config=_configs(config or ()),
        stage=stage,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(made.to_json(), indent=1, allow_nan=False))
    else:
        from rich.console import Console

        from limbeck.planner.table import rendered

        console = Console(highlight=False, soft_wrap=True)
        # In a pipe nobody breaks lines: every row stays one.
        console = console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=PIPED)
        for thing in rendered(made, details=not brief):
            console.print(thing)
    if not made.fits:
        raise typer.Exit(DOES_NOT_FIT)


def _configs(words: Iterable[str]) -> dict[str, str]:
    """``NAME=FILE`` words."""
    found = {}
    for word in words:
        name, _, file = word.rpartition("=")
        if not name or not file:
            raise LimbeckError(f"--config: {word!r} is not NAME=FILE: write the model's name as the recipe has it, and its config.json")
        found[name] = file
    return found
