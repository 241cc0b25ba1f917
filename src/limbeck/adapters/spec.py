"""Which Linears of a model a LoRA changes, and the factors of many LoRAs at once.

Shape suffixes: **N** adapters, **L** layers that have a site, **R** rank, **I** input and **O** output features.  The change of one
Linear is ``dW_OI = scale * B_OR @ A_RI``, PEFT's ``lora_B.weight @ lora_A.weight``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import AdapterError


@dataclass(frozen=True)
class Site:
    """One kind of Linear, in all the layers that have it: what shares its heads in a generator and is stacked in a tensor."""

    name: str
    """Path below the layer, such as ``self_attn.q_proj``; with ``@OxI`` behind it where layers differ in shape."""
    module: str
    """Path below the layer."""
    in_features: int
    out_features: int
    prefix: str
    """Path of the list of layers, such as ``model.layers``."""
    layers: tuple[int, ...]
    """Layers that have it, ascending."""

    def paths(self) -> list[str]:
        """Full module paths, one a layer."""
        return [f"{self.prefix}.{layer}.{self.module}" for layer in self.layers]


@dataclass(frozen=True)
class AdapterSpec:
    """The shape of a LoRA: sites, rank and scaling.  Two adapters can be compared or merged if their sites are the same."""

    sites: tuple[Site, ...]
    rank: int
    alpha: float
    rslora: bool = False
    """Scale by ``alpha / sqrt(rank)`` instead of ``alpha / rank``."""

    @property
    def scale(self) -> float:
        """Factor on ``B @ A``."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def num_parameters(self) -> int:
        """Numbers of one adapter."""
        return sum(len(site.layers) * self.rank * (site.in_features + site.out_features) for site in self.sites)

    @property
    def paths(self) -> list[str]:
        """Every changed Linear."""
        return [path for site in self.sites for path in site.paths()]

    def site(self, name: str) -> Site:
        """A site by its name."""
        return next(site for site in self.sites if site.name == name)

    def table(self) -> list[str]:
        """Lines for a person: each site with its shape, number of layers and parameters."""
        width = max(len(site.name) for site in self.sites)
        lines = [
            f"{site.name:<{width}}  {site.in_features} -> {site.out_features}  x {len(site.layers)} layers"
            f"  {len(site.layers) * self.rank * (site.in_features + site.out_features):,} numbers"
            for site in self.sites
        ]
        return [*lines, f"rank {self.rank}, scale {self.scale:g}: {self.num_parameters:,} numbers in {len(self.paths)} Linears"]

    def to_json(self) -> dict[str, Any]:
        """For manifests."""
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "rslora": self.rslora,
            "sites": [{**vars(site), "layers": list(site.layers)} for site in self.sites],
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> AdapterSpec:
        """What :meth:`to_json` gave."""
        sites = tuple(Site(**{**site, "layers": tuple(site["layers"])}) for site in value["sites"])
        return AdapterSpec(sites, value["rank"], value["alpha"], value["rslora"])


@dataclass(frozen=True)
class Adapters:
    """N LoRAs of one spec: ``A[site.name]`` is ``[N, L, R, I]``, ``B[site.name]`` is ``[N, L, O, R]``."""

    spec: AdapterSpec
    A: Mapping[str, Tensor]
    B: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for site in self.spec.sites:
            shape_A = (len(self), len(site.layers), self.spec.rank, site.in_features)
            shape_B = (len(self), len(site.layers), site.out_features, self.spec.rank)
            for factor, found, wanted in (("A", self.A[site.name], shape_A), ("B", self.B[site.name], shape_B)):
                if tuple(found.shape) != wanted:
                    raise AdapterError(f"{factor} of {site.name} is {tuple(found.shape)}, the spec says {wanted}")

    def __len__(self) -> int:
        """Number of adapters."""
        return next(iter(self.A.values())).shape[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> Adapters:
        """The same spec with every factor changed."""
        return replace(self, A={n: change(t) for n, t in self.A.items()}, B={n: change(t) for n, t in self.B.items()})

    def pick(self, indices: Tensor | Sequence[int] | slice) -> Adapters:
        """Some of them, ``indices [M]``, in that order."""
        if isinstance(indices, slice):
            return self.map(lambda t: t[indices])
        wanted = torch.as_tensor(indices, dtype=torch.int64)
        return self.map(lambda t: t.index_select(0, wanted.to(t.device)))

    def to(self, *args: Any) -> Adapters:
        """Another device or dtype."""
        return self.map(lambda t: t.to(*args))

    def detach(self) -> Adapters:
        """Without a graph."""
        return self.map(Tensor.detach)

    def tensors(self) -> list[Tensor]:
        """All factors, in the order of the sites: A then B of each."""
        return [factors[site.name] for site in self.spec.sites for factors in (self.A, self.B)]

    def change(self, name: str) -> Tensor:
        """``dW [N, L, O, I]`` of one site, formed in full: for checks and for merges that look at single entries."""
        return self.spec.scale * (self.B[name] @ self.A[name])


def cat(parts: Iterable[Adapters]) -> Adapters:
    """Several lots of adapters of one spec as one, in order."""
    lots = list(parts)
    check_same_spec([lot.spec for lot in lots])
    names = [site.name for site in lots[0].spec.sites]
    return Adapters(
        lots[0].spec,
        {name: torch.cat([lot.A[name] for lot in lots]) for name in names},
        {name: torch.cat([lot.B[name] for lot in lots]) for name in names},
    )


def check_same_spec(specs: Sequence[AdapterSpec], *, sites_only: bool = False) -> None:
    """Raise :class:`AdapterError` naming the first difference.  ``sites_only`` lets rank and scale differ."""
    first = specs[0]
    for other in specs[1:]:
        here, there = {s.name: s for s in first.sites}, {s.name: s for s in other.sites}
        for name in {**here, **there}:
            if here.get(name) != there.get(name):
                raise AdapterError(
                    f"adapters differ in {name}: {_described(here.get(name))} in one and {_described(there.get(name))} in the other: give them the same targets"
                )
        if not sites_only and (first.rank, first.scale) != (other.rank, other.scale):
            raise AdapterError(f"adapters differ: rank {first.rank}, scale {first.scale:g} and rank {other.rank}, scale {other.scale:g}")


def _described(site: Site | None) -> str:
    if site is None:
        return "not changed"
    return f"{site.in_features} -> {site.out_features} in {site.prefix} {', '.join(map(str, site.layers))}"
