"""``limbeck doctor``: can this machine, or a teacher elsewhere, do the work?"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from limbeck import api

NOT_READY = 2


def doctor(
    teacher: Annotated[
        str | None, typer.Option(metavar="URL", help="Try a served teacher instead: is it there, what can it do?", show_default=False)
    ] = None,
    protocol: Annotated[str, typer.Option(help="What it speaks: limbeck, vllm, sglang or seed.")] = "limbeck",
    model: Annotated[str | None, typer.Option(help="Its name of the model (vLLM).", show_default=False)] = None,
    token_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable that holds its token.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Look at this machine and its packages, or at a served teacher.

    \b
    limbeck doctor
    limbeck doctor --json
    limbeck doctor --teacher http://127.0.0.1:8000 --protocol vllm

    Ends with exit code 2 if something stands in the way of a run.  Needs no network but the teacher.
    """
    if teacher is not None:
        served = api.try_teacher(teacher, protocol=protocol, model=model, token_env=token_env)
        if as_json:
            typer.echo(json.dumps(served.to_json(), indent=1))
            return
        for line in served.lines:
            typer.echo(line)
        typer.echo("\nverdict: ready")
        return
    found = api.doctor()
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        group = None
        for fact in found.facts:
            if fact.group != group:
                group = fact.group
                typer.echo(f"{group}:")
            typer.echo(f"  {fact.name:<24}{fact.text}")
        typer.echo("")
        for line in found.advice:
            typer.echo(f"advice: {line}")
        ready = "ready (`limbeck quickstart` is a real distillation on this machine)"
        typer.echo(f"verdict: {ready if found.ready else '; '.join(found.problems)}")
    if not found.ready:
        raise typer.Exit(NOT_READY)
