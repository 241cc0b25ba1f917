"""``limbeck generate``: let a model write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from limbeck import api


def generate(
    path: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="RUN/STAGE, a model folder, or builtin:NAME.")],
    prompt: Annotated[str, typer.Option(help="What to go on from.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 for greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sampling.")] = 0,
    condition: Annotated[
        list[str] | None,
        typer.Option(help="Text that a LoRA generator reads; several times for several; by default the prompt.", show_default=False),
    ] = None,
    condition_file: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="The same from a file: each is one text.", show_default=False)
    ] = None,
    named: Annotated[
        str | None, typer.Option(metavar="NAME", help="A condition of the LoRA generator's own data to read instead.", show_default=False)
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show what the base writes without the generated LoRA, too.")] = False,
) -> None:
    """Continue a prompt, as it is decoded.

    \b
    limbeck generate runs/hybrid/distil --prompt "def main(" --tokens 64
    limbeck generate runs/lora_generator/generate --condition "reverse a list" --prompt "def reverse(" --compare

    A LoRA generator reads a condition first, and its base writes with the LoRA.
    """
    found = api.continuations(
        path, prompt, tokens=tokens, temperature=temperature, seed=seed, condition=condition or (), condition_files=condition_file or (),
        named=named, compare=compare,
    )  # fmt: skip
    for title, pieces in found.items():
        if compare:
            typer.echo(f"--- {title}")
        typer.echo(prompt, nl=False)
        for text in pieces:
            typer.echo(text, nl=False)
        typer.echo("")
