"""What two LoRAs have in common, whatever factors they are written in.

(A, B) and (R^-1 A, B R) are the same LoRA for every invertible R, so factors cannot be compared entry by entry.  Here: one form that
every gauge of an adapter has in common, and inner products, norms and cosines of whole adapters in the space of ``dW``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from limbeck.adapters.spec import Adapters, AdapterSpec, Site, cat, check_same_spec
from limbeck.errors import AdapterError
from limbeck.ops import low_rank

SHARED = 1e-6
"""Relative difference up to which two A count as one."""


@torch.no_grad()
def canonical(adapters: Adapters) -> Adapters:
    """The same ``dW`` from ``A = sqrt(S) Vt``, ``B = U sqrt(S) / scale``, where ``U S Vt = dW``.

    Singular values descend and the largest entry of every column of U is positive, so that every gauge of an adapter gives these
    factors if its singular values are distinct (equal ones leave a rotation open).  Decomposed in fp64, given back in the adapters'
    dtype (fp32 at least); a zero ``dW`` has zero factors.
    """
    spec = adapters.spec
    A: dict[str, Tensor] = {}
    B: dict[str, Tensor] = {}
    for site in spec.sites:
        a, b = low_rank.widened(adapters.A[site.name]), low_rank.widened(adapters.B[site.name])
        U, S, Vt = low_rank.product_svd(a.double(), spec.scale * b.double())
        left, right = low_rank.balanced(U, _without_noise(S, a.dtype), Vt)
        A[site.name] = low_rank.filled(left, -2, spec.rank).to(a.dtype)
        B[site.name] = low_rank.filled(right / spec.scale, -1, spec.rank).to(b.dtype)
    return replace(adapters, A=A, B=B)


def inner(a: Adapters, b: Adapters, moments: Mapping[str, Tensor] | None = None) -> Tensor:
    """``[N, M]``: ``sum <dW_n, dW_m>_F`` over all sites and layers, scales included.  Differentiable.

    Ranks and scales may differ, the changed Linears may not (:func:`align` makes them equal).  ``moments[name] [L, I, I]`` are the
    second moments of the Linears' inputs, for inner products of what the adapters add to the outputs.
    """
    _check_sites(a, b)
    total = sum(
        low_rank.pairwise_inner(
            a.A[site.name], a.B[site.name], b.A[site.name], b.B[site.name], None if moments is None else moments[site.name]
        ).sum(-1)
        for site in a.spec.sites
    )
    return a.spec.scale * b.spec.scale * torch.as_tensor(total)


def site_norms(a: Adapters, moments: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """``{site: [N, L]}``: the Frobenius norm of every ``dW``, with ``moments`` as in :func:`inner`.  Its gradient is zero where B
    is zero."""
    return {
        site.name: a.spec.scale
        * low_rank.root(low_rank.squared_norm(a.A[site.name], a.B[site.name], None if moments is None else moments[site.name]))
        for site in a.spec.sites
    }


def norms(a: Adapters, moments: Mapping[str, Tensor] | None = None) -> Tensor:
    """``[N]``: the Frobenius norm of all ``dW`` of an adapter together, with ``moments`` as in :func:`inner`."""
    squares = sum(norm.square().sum(1) for norm in site_norms(a, moments).values())
    return low_rank.root(torch.as_tensor(squares))


def cosine(a: Adapters, b: Adapters, moments: Mapping[str, Tensor] | None = None) -> Tensor:
    """``[N, M]``: cosines in the space of ``dW``, with ``moments`` as in :func:`inner`; 0 where one of the two is zero."""
    sizes = norms(a, moments)[:, None] * norms(b, moments)[None]
    zero = sizes == 0
    return torch.where(zero, 0, inner(a, b, moments) / torch.where(zero, 1, sizes))


def gauge_gap(adapters: Adapters) -> float:
    """How far the A of these adapters differ: the largest ``|A_n - A_0| / |A_0|`` over sites and layers, 0 if they share one."""
    gaps = []
    for A in adapters.A.values():
        first = low_rank.widened(A[:1])
        size = torch.linalg.matrix_norm(first)
        gap = torch.linalg.matrix_norm(low_rank.widened(A) - first)
        gaps.append(torch.where(gap == 0, 0, gap / size).amax())
    return float(torch.stack(gaps).amax())


def shared_gauge(adapters: Adapters) -> bool:
    """Whether all have the same A (to 1e-6), so that averages of their B, and of no others, are averages of ``dW``."""
    return gauge_gap(adapters) <= SHARED


def align(lots: Sequence[Adapters]) -> Adapters:
    """Adapters of different ranks, scales and targets as one lot of one spec, in order; every ``dW`` stays what it is.

    Ranks are filled with zeros to the largest, Linears that an adapter leaves alone get zero factors, and scales are multiplied
    into B unless all agree.

    Raises:
        AdapterError: one Linear has two shapes: the adapters belong to different models.
    """
    specs = [lot.spec for lot in lots]
    sites = _union(specs)
    if all(spec == specs[0] for spec in specs):
        return cat(lots)
    rank = max(spec.rank for spec in specs)
    same = len({(spec.scale, spec.rank) for spec in specs}) == 1
    spec = replace(specs[0], sites=sites) if same else AdapterSpec(sites, rank, alpha=rank)
    return cat([_spread(lot, spec) for lot in lots])


def _union(specs: Sequence[AdapterSpec]) -> tuple[Site, ...]:
    layers: dict[str, set[int]] = defaultdict(set)
    first: dict[str, Site] = {}
    for site in (site for spec in specs for site in spec.sites):
        known = first.setdefault(site.name, site)
        if replace(site, layers=known.layers) != known:
            raise AdapterError(
                f"adapters differ in {site.name}: {known.prefix} {known.in_features} -> {known.out_features} and "
                f"{site.prefix} {site.in_features} -> {site.out_features}; only adapters of one base model can be put together"
            )
        layers[site.name] |= set(site.layers)
    return tuple(replace(site, layers=tuple(sorted(layers[name]))) for name, site in first.items())


def _spread(lot: Adapters, spec: AdapterSpec) -> Adapters:
    """The lot in a spec of at least its rank and sites."""
    A: dict[str, Tensor] = {}
    B: dict[str, Tensor] = {}
    held = {site.name: site for site in lot.spec.sites}
    sample = low_rank.widened(next(iter(lot.A.values())))
    for site in spec.sites:
        A[site.name] = sample.new_zeros(len(lot), len(site.layers), spec.rank, site.in_features)
        B[site.name] = sample.new_zeros(len(lot), len(site.layers), site.out_features, spec.rank)
        if site.name in held:
            rows = [site.layers.index(layer) for layer in held[site.name].layers]
            A[site.name][:, rows] = low_rank.filled(low_rank.widened(lot.A[site.name]), -2, spec.rank)
            B[site.name][:, rows] = low_rank.filled(low_rank.widened(lot.B[site.name]), -1, spec.rank) * (lot.spec.scale / spec.scale)
    return Adapters(spec, A, B)


def _check_sites(a: Adapters, b: Adapters) -> None:
    if a.spec.sites is not b.spec.sites:
        check_same_spec([a.spec, b.spec], sites_only=True)


def _without_noise(S: Tensor, dtype: torch.dtype) -> Tensor:
    """Singular values with those set to zero that rounding of the factors to ``dtype`` could have made."""
    noise = torch.finfo(dtype).eps * S.shape[-1] * S[..., :1]
    return torch.where(noise < S, S, 0)
