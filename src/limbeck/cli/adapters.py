"""``limbeck adapters``: the algebra of LoRA files by hand, on folders in PEFT's format and without their base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from limbeck import api
from limbeck.cli.arguments import Folders
from limbeck.errors import AdapterError

if TYPE_CHECKING:
    from limbeck.adapters.folders import Shown


def show(folders: Folders) -> None:
    """What adapters change, how much, and whether one is zero or broken.

    \b
    limbeck adapters show runs/lora_generator/export/export/peft/*/
    """
    from limbeck.cli.console import say

    for folder in folders:
        adapter = api.show_adapters(folder)
        say(f"{folder}: base {adapter.base or 'not named'}; {_state(adapter)}")
        for line in adapter.table:
            say(f"  {line}")
        rows = [
            [
                site.name,
                *(f"{x:.4g}" for x in (site.whole, site.least, site.mean, site.largest)),
                ", ".join(map(str, site.zero_in)),
            ]
            for site in adapter.sites
        ]
        say(_table(["site", "|dW|", "least", "mean", "largest layer", "zero in layers"], rows))
        for field, value in adapter.provenance.items():
            say(f"  {field}: {value}")


def merge(
    folders: Folders,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    method: Annotated[
        str, typer.Option(help="weighted, task_arithmetic, cat, ties, dare_linear, dare_ties, or factors (for a shared A).")
    ] = "weighted",
    weights: Annotated[
        str | None,
        typer.Option(
            help="One number for each folder, such as 0.7,0.3; equal by default (1 each for task_arithmetic).", show_default=False
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Of the result; by default what keeps a sum exact.", show_default=False)
    ] = None,
    density: Annotated[float, typer.Option(help="Share of entries that TIES and DARE keep.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of DARE's masks.")] = 0,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="The base to name in the result; by default the one that all name.", show_default=False
        ),
    ] = None,
) -> None:
    """Make one adapter of several, in the space of dW.

    \b
    limbeck adapters merge maths code --out both --weights 0.5,0.5 --rank 16
    limbeck adapters merge maths code prose --out all --method ties --density 0.2
    """
    from limbeck.cli.console import say

    merged = api.merge_adapters(
        folders, out, method=method, weights=_numbers(weights), rank=rank, density=density, seed=seed, base=base
    )
    say(f"merged {len(folders)} adapters ({method}) at rank {merged.adapters.spec.rank}: {out}")
    for name, kept in merged.energy.items():
        say(
            f"  {name}: {float(kept.min()):.2%} of the squared norm kept in the layer that lost most, {float(kept.mean()):.2%} on average"
        )


def retrieve(
    query: Annotated[Path, typer.Argument(metavar="QUERY", help="The adapter to look for.")],
    pool: Annotated[list[Path], typer.Argument(metavar="POOL", help="Adapters to rank.")],
    k: Annotated[int | None, typer.Option("-k", help="How many to show; all by default.", show_default=False)] = None,
    temperature: Annotated[float, typer.Option(help="Of the softmax that makes weights of cosines.")] = 0.1,
) -> None:
    """Rank adapters by their cosine to one, in the space of dW.

    It does not matter what factors they are written in.

    \b
    limbeck adapters retrieve new maths code prose -k 2
    """
    from limbeck.cli.console import say

    found = api.retrieve_adapters(query, pool, k=k, temperature=temperature)
    rows = [[f"{match.cosine:.4f}", f"{match.weight:.4f}", f"{match.relative_norm:.4g}", str(match.folder)] for match in found]
    say(_table(["cosine", "weight", "norm / query's", "adapter"], rows))


def _state(adapter: Shown) -> str:
    """In words: zero, broken, or its norm."""
    if adapter.broken:
        return f"BROKEN: numbers that are not finite in {', '.join(adapter.broken)}"
    return f"|dW| {adapter.norm:.4g}" if adapter.norm else "ZERO: it changes nothing"


def _table(columns: list[str], rows: list[list[str]]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise AdapterError(f"--weights is {text!r}, and must be numbers with commas between them, such as 0.7,0.3") from error
