"""``limbeck plan``: memory, time, wire and disk, before a GPU is rented."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from limbeck.cli.arguments import Overrides

DOES_NOT_FIT = 1
PIPED = 240
"""Columns where no terminal says how many."""


def plan(
    what: Annotated[str, typer.Argument(metavar="RECIPE_OR_MODEL", help="A recipe (file or shipped name), a model's folder, config.json or name.")],
    overrides: Overrides = None,
    device: Annotated[str, typer.Option(help="h100, h200, a100, b200, l40s, rtx4090 or cpu.")] = "h100",
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
    stage: Annotated[str | None, typer.Option(help="One stage alone.", show_default=False)] = None,
    brief: Annotated[bool, typer.Option("--brief", help="Without the details of each stage.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    """Memory, time, wire and disk of a recipe or a model, and whether it fits (exit code 1 if not).  Loads no torch.

    limbeck plan agentic_lora --device h200 --gpus 8
    """
    import json
    from dataclasses import replace

    from limbeck.planner.devices import PlanError, find_device, parse_bytes, parse_count
    from limbeck.planner.machine import Machine
    from limbeck.planner.plan import plan_of
    from limbeck.planner.serving import DTYPES

    if dtype is not None and dtype not in DTYPES:
        raise PlanError(f"--dtype: no dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    chosen = find_device(device, None if memory is None else parse_bytes(memory, "--memory"))
    if peak is not None:
        chosen = replace(chosen, bf16=peak * 1e12, fp8=None)
    if bandwidth is not None:
        chosen = replace(chosen, bandwidth=bandwidth * 1e12)
    machine = Machine(
        chosen,
        gpus,
        usable,
        mfu,
        tp,
        ep,
        dtype,
        context,
        sequences,
        None if tokens is None else parse_count(tokens, "--tokens"),
        None if teacher_rate is None else parse_count(teacher_rate, "--teacher-rate"),
        None if disk is None else parse_bytes(disk, "--disk"),
    )
    made = plan_of(what, overrides or (), machine, _configs(config or ()), stage)
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


def _configs(words: list[str] | tuple[()]) -> dict[str, Path]:
    """``NAME=FILE`` words."""
    from limbeck.planner.devices import PlanError

    found = {}
    for word in words:
        name, _, file = word.rpartition("=")
        if not name or not file:
            raise PlanError(f"--config: {word!r} is not NAME=FILE: write the model's name as the recipe has it, and its config.json")
        path = Path(file).expanduser()
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise PlanError(f"--config: {file}: no such file: give the model's config.json, or the folder that has it")
        found[name] = path
    return found
