"""``limbeck adapters``: the algebra of LoRA files by hand, on folders in PEFT's format and without their base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from limbeck.adapters.spec import Adapters

adapters = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    help="Show, merge and search LoRA adapters (folders in PEFT's format).",
)  # fmt: skip
Folders = Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Folders with an adapter_config.json.")]


@adapters.command()
def show(folders: Folders) -> None:
    """What adapters change, how much, and whether one is zero or broken."""
    from limbeck.adapters.peft_files import read_base, read_peft_file, read_provenance
    from limbeck.cli.console import say

    for folder in folders:
        adapter = read_peft_file(folder)
        say(f"{folder}: base {read_base(folder) or 'not named'}; {_state(adapter)}")
        for line in adapter.spec.table():
            say(f"  {line}")
        say(_norm_table(adapter))
        for field, value in read_provenance(folder).items():
            say(f"  {field}: {value}")


@adapters.command()
def merge(
    folders: Folders,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    method: Annotated[
        str, typer.Option(help="weighted, task_arithmetic, cat, ties, dare_linear, dare_ties, or factors (for a shared A).")
    ] = "weighted",
    weights: Annotated[
        str | None,
        typer.Option(help="One number for each folder, such as 0.7,0.3; equal by default (1 each for task_arithmetic).", show_default=False),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the result; by default what keeps a sum exact.", show_default=False)] = None,
    density: Annotated[float, typer.Option(help="Share of entries that TIES and DARE keep.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of DARE's masks.")] = 0,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base to name in the result; by default the one that all name.", show_default=False)
    ] = None,
) -> None:
    """Make one adapter of several, in the space of dW.

    limbeck adapters merge maths code --out both --weights 0.5,0.5 --rank 16
    """
    from limbeck.adapters.gauge import align
    from limbeck.adapters.merge import merge as merge_adapters
    from limbeck.adapters.peft_files import read_as_parameters, read_peft_file, write_peft
    from limbeck.cli.console import say

    base = base or _shared_base(folders)
    numbers = _numbers(weights)
    pool = align([read_peft_file(folder) for folder in folders])
    merged = merge_adapters(pool, numbers, method=method, rank=rank, density=density, seed=seed)
    story = {"merged": [str(folder) for folder in folders], "method": method, "weights": numbers or "default", "rank": merged.adapters.spec.rank}
    if method in ("ties", "dare_linear", "dare_ties"):
        story |= {"density": density} if method == "ties" else {"density": density, "seed": seed}
    as_parameters = {path for folder in folders for path in read_as_parameters(folder)}
    write_peft(merged.adapters, 0, out, base=base, provenance=story, as_parameters=as_parameters)
    say(f"merged {len(folders)} adapters ({method}) at rank {merged.adapters.spec.rank}: {out}")
    for name, kept in merged.energy.items():
        say(f"  {name}: {float(kept.min()):.2%} of the squared norm kept in the layer that lost most, {float(kept.mean()):.2%} on average")


@adapters.command()
def retrieve(
    query: Annotated[Path, typer.Argument(metavar="QUERY", help="The adapter to look for.")],
    pool: Annotated[list[Path], typer.Argument(metavar="POOL...", help="Adapters to rank.")],
    k: Annotated[int | None, typer.Option("-k", help="How many to show; all by default.", show_default=False)] = None,
    temperature: Annotated[float, typer.Option(help="Of the softmax that makes weights of cosines.")] = 0.1,
) -> None:
    """Rank adapters by their cosine to one, in the space of dW, whatever factors they are written in."""
    from limbeck.adapters.gauge import align, cosine, norms
    from limbeck.adapters.peft_files import read_peft_file
    from limbeck.cli.console import say
    from limbeck.errors import AdapterError

    lots = align([read_peft_file(folder) for folder in (query, *pool)])
    wanted, rest = lots.pick([0]), lots.pick(slice(1, None))
    sizes = norms(lots)
    broken = [str(folder) for folder, size in zip((query, *pool), sizes, strict=True) if not size.isfinite()]
    if broken:
        raise AdapterError(f"{', '.join(broken)}: the numbers are not finite, so there is nothing to compare")
    if not sizes[0] > 0:
        raise AdapterError(f"{query} is zero: it has no direction that others could be compared with")
    if k is not None and not 1 <= k <= len(pool):
        raise AdapterError(f"-k is {k}, and there are {len(pool)} adapters to rank: 1 to {len(pool)} are possible")
    cosines = cosine(wanted, rest)[0]
    order = cosines.argsort(descending=True, stable=True)[: k or len(pool)]
    shares = (cosines[order] / _positive(temperature)).softmax(0)
    rows = [
        [f"{float(cosines[i]):.4f}", f"{float(share):.4f}", f"{float(sizes[i + 1] / sizes[0]):.4g}", str(pool[i])]
        for i, share in zip(order.tolist(), shares, strict=True)
    ]
    say(_table(["cosine", "weight", "norm / query's", "adapter"], rows))


def _state(adapter: Adapters) -> str:
    """In words: zero, broken, or its norm."""
    from limbeck.adapters.gauge import norms

    bad = [
        f"{factor} of {site.name}"
        for site in adapter.spec.sites
        for factor, stacked in (("A", adapter.A[site.name]), ("B", adapter.B[site.name]))
        if not stacked.isfinite().all()
    ]
    if bad:
        return f"BROKEN: numbers that are not finite in {', '.join(bad)}"
    size = float(norms(adapter)[0])
    return f"|dW| {size:.4g}" if size else "ZERO: it changes nothing"


def _norm_table(adapter: Adapters) -> Any:
    from limbeck.adapters.gauge import site_norms

    rows = []
    for name, norms_NL in site_norms(adapter).items():
        sizes = norms_NL[0]
        layers = adapter.spec.site(name).layers
        zeros = [str(layer) for layer, size in zip(layers, sizes, strict=True) if size == 0]
        rows.append([name, *(f"{float(x):.4g}" for x in (sizes.square().sum().sqrt(), sizes.min(), sizes.mean(), sizes.max())), ", ".join(zeros)])
    return _table(["site", "|dW|", "least", "mean", "largest layer", "zero in layers"], rows)


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


def _shared_base(folders: list[Path]) -> str | None:
    from limbeck.adapters.peft_files import read_base
    from limbeck.errors import AdapterError

    bases = {base for folder in folders if (base := read_base(folder))}
    if len(bases) > 1:
        raise AdapterError(f"the adapters name different bases ({', '.join(sorted(bases))}): if they are one model, name it with --base")
    return bases.pop() if bases else None


def _numbers(text: str | None) -> list[float] | None:
    from limbeck.errors import AdapterError

    if text is None:
        return None
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise AdapterError(f"--weights is {text!r}, and must be numbers with commas between them, such as 0.7,0.3") from error


def _positive(temperature: float) -> float:
    from limbeck.errors import AdapterError

    if not temperature > 0:
        raise AdapterError(f"--temperature is {temperature:g}, and must be above 0")
    return temperature
