"""``limbeck generate``: let a model write."""

from __future__ import annotations

from typing import Annotated

import typer


def generate(
    path: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="RUN/STAGE, a model folder, or builtin:NAME.")],
    prompt: Annotated[str, typer.Option(help="What to go on from.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 for greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
) -> None:
    """Continue a prompt, as it is decoded."""
    from limbeck.stages.generate import generate_text

    typer.echo(prompt, nl=False)
    for text in generate_text(path, prompt, tokens=tokens, temperature=temperature, seed=seed):
        typer.echo(text, nl=False)
    typer.echo("")
