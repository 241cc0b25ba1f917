"""The algebra by hand, on folders in PEFT's format and without their base model: what `limbeck adapters` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from limbeck.adapters.gauge import align, cosine, norms, site_norms
from limbeck.adapters.merge import Merged, merge
from limbeck.adapters.peft_files import read_as_parameters, read_base, read_peft_file, read_provenance, write_peft
from limbeck.errors import AdapterError

AnyPath = str | PathLike[str]


@dataclass(frozen=True)
class SiteNorms:
    """Frobenius norms of one site's ``dW``, over its layers."""

    name: str
    whole: float
    least: float
    mean: float
    largest: float
    zero_in: tuple[int, ...]
    """Layers that it leaves alone."""


@dataclass(frozen=True)
class Shown:
    """What a folder holds."""

    folder: Path
    base: str | None
    """The base that it names."""
    norm: float
    """Frobenius norm of all ``dW`` together, whatever the gauge: 0 changes nothing."""
    broken: tuple[str, ...]
    """Factors with numbers that are not finite."""
    table: tuple[str, ...]
    """Rank, scale and shapes, a line each."""
    sites: tuple[SiteNorms, ...]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Match:
    """One adapter beside the one that is looked for."""

    folder: Path
    cosine: float
    weight: float
    """Of the softmax over all that are shown."""
    relative_norm: float
    """Its norm over that of the query."""


def show_adapters(folder: AnyPath) -> Shown:
    """What an adapter changes, how much, and whether it is zero or broken.

    ``limbeck.show_adapters("runs/lora_generator/export/export/peft/0").norm``

    Raises:
        AdapterError: no folder in PEFT's format.
    """
    folder = Path(folder)
    adapter = read_peft_file(folder)
    broken = tuple(
        f"{factor} of {site.name}"
        for site in adapter.spec.sites
        for factor, stacked in (("A", adapter.A[site.name]), ("B", adapter.B[site.name]))
        if not stacked.isfinite().all()
    )
    sites = []
    for name, norms_NL in site_norms(adapter).items():
        sizes = norms_NL[0]
        zeros = tuple(layer for layer, size in zip(adapter.spec.site(name).layers, sizes, strict=True) if size == 0)
        whole, least, mean, largest = (float(x) for x in (sizes.square().sum().sqrt(), sizes.min(), sizes.mean(), sizes.max()))
        sites.append(SiteNorms(name, whole, least, mean, largest, zeros))
    return Shown(
        folder,
        read_base(folder),
        float(norms(adapter)[0]),
        broken,
        tuple(adapter.spec.table()),
        tuple(sites),
        read_provenance(folder),
    )


def merge_adapters(
    folders: Sequence[AnyPath],
    out: AnyPath,
    *,
    method: str = "weighted",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float = 0.2,
    seed: int = 0,
    base: str | None = None,
) -> Merged:
    """Make one adapter of several, in the space of ``dW``, and write it to ``out``.

    ``method`` is a key of :data:`limbeck.adapters.merge.METHODS`; ``weights`` are equal by default (1 each for task_arithmetic), ``rank`` is what
    keeps a sum exact, and ``base`` the one that all folders name.

    ``limbeck.merge_adapters(["maths", "code"], "both", weights=[0.7, 0.3], rank=16)``

    Raises:
        AdapterError: folders that do not fit each other, or settings that do not fit the method.
    """
    sources = [Path(folder) for folder in folders]
    base = base or _shared_base(sources)
    pool = align([read_peft_file(folder) for folder in sources])
    merged = merge(pool, weights, method=method, rank=rank, density=density, seed=seed)
    story = {
        "merged": [str(folder) for folder in sources],
        "method": method,
        "weights": weights or "default",
        "rank": merged.adapters.spec.rank,
    }
    if method in ("ties", "dare_linear", "dare_ties"):
        story |= {"density": density} if method == "ties" else {"density": density, "seed": seed}
    as_parameters = {path for folder in sources for path in read_as_parameters(folder)}
    write_peft(merged.adapters, 0, Path(out), base=base, provenance=story, as_parameters=as_parameters)
    return merged


def retrieve_adapters(query: AnyPath, pool: Sequence[AnyPath], *, k: int | None = None, temperature: float = 0.1) -> list[Match]:
    """Adapters by their cosine to one, nearest first, in the space of ``dW``, whatever factors they are written in.

    ``k`` is how many to give, ``temperature`` of the softmax that makes weights of cosines.

    ``limbeck.retrieve_adapters("new", ["maths", "code"])[0].folder``

    Raises:
        AdapterError: adapters that are broken or do not fit each other, a zero query, or a ``k`` or ``temperature`` that is out of range.
    """
    others = [Path(folder) for folder in pool]
    everybody = [Path(query), *others]
    lots = align([read_peft_file(folder) for folder in everybody])
    wanted, rest = lots.pick([0]), lots.pick(slice(1, None))
    sizes = norms(lots)
    broken = [str(folder) for folder, size in zip(everybody, sizes, strict=True) if not size.isfinite()]
    if broken:
        raise AdapterError(
            f"{', '.join(broken)}: the numbers are not finite, so there is nothing to compare; `limbeck adapters show` says in which factors"
        )
    if not sizes[0] > 0:
        raise AdapterError(
            f"{query} is zero: it has no direction that others could be compared with; name an adapter that was trained"
        )
    if k is not None and not 1 <= k <= len(others):
        raise AdapterError(f"-k is {k}, and there are {len(others)} adapters to rank: 1 to {len(others)} are possible")
    if not temperature > 0:
        raise AdapterError(f"--temperature is {temperature:g}, and must be above 0")
    cosines = cosine(wanted, rest)[0]
    order = cosines.argsort(descending=True, stable=True)[: k or len(others)]
    shares = (cosines[order] / temperature).softmax(0)
    return [
        Match(others[i], float(cosines[i]), float(share), float(sizes[i + 1] / sizes[0]))
        for i, share in zip(order.tolist(), shares, strict=True)
    ]


def _shared_base(folders: Sequence[Path]) -> str | None:
    bases = {base for folder in folders if (base := read_base(folder))}
    if len(bases) > 1:
        raise AdapterError(
            f"the adapters name different bases ({', '.join(sorted(bases))}): if they are one model, name it with --base"
        )
    return bases.pop() if bases else None
