"""Several LoRAs made into one, in the space of ``dW``: never by averaging A and B apart, which adds cross terms.

``weighted`` and ``task_arithmetic`` are sums ``sum_n w_n dW_n`` that are taken exactly by joining the factors along the rank; TIES and
DARE look at single entries of ``dW``, of which one Linear's are formed at a time.  TIES: Yadav et al. 2023 (arXiv 2306.01708); DARE:
Yu et al. 2023 (arXiv 2311.03099); both with weights, as in PEFT's and mergekit's forms.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from limbeck.adapters.gauge import gauge_gap, shared_gauge
from limbeck.adapters.spec import Adapters, AdapterSpec, Site
from limbeck.errors import AdapterError, did_you_mean
from limbeck.ops import low_rank

METHODS = {
    "weighted": "sum of w dW, weights 1/N by default, at the smallest rank that holds it",
    "task_arithmetic": "the same with weights 1 by default",
    "cat": "the same by joining the factors: rank N * R, no decomposition",
    "ties": "the largest entries of each dW, signs elected, the mean of those that agree",
    "dare_linear": "random entries of each dW, rescaled, summed",
    "dare_ties": "random entries of each dW, rescaled, signs elected, the mean of those that agree",
    "factors": "weighted A and B: only for adapters that share their A, where it is exact",
}
"""What each method does, for people."""
_EXACT_SIDE = 1024
"""Smaller side of a ``dW`` up to which all its singular values are computed."""
_OVERSAMPLING = 16
_POWER_ITERATIONS = 4


@dataclass(frozen=True)
class Merged:
    """M merged adapters, and the share of each Linear's squared norm that their rank holds."""

    adapters: Adapters
    energy: Mapping[str, Tensor] = field(default_factory=dict)
    """``{site: [M, L]}`` in [0, 1]: ``|kept dW|^2 / |dW|^2``, 1 for a zero ``dW``."""

    @property
    def lowest_energy(self) -> float:
        """That of the Linear that lost most."""
        return min(float(kept.min()) for kept in self.energy.values())


@torch.no_grad()
def merge(
    adapters: Adapters,
    weights: Tensor | Sequence[float] | None = None,
    *,
    method: str = "weighted",
    rank: int | None = None,
    density: float = 0.2,
    seed: int = 0,
) -> Merged:
    """One adapter from N with ``weights [N]``, or M with ``weights [M, N]``; of scale 1 (``factors`` keeps the spec).

    Args:
        method: one of :data:`METHODS`.
        rank: of the result.  By default what a sum needs to be exact (to the rounding of the factors), and N * R for TIES and DARE,
            whose sums have no low rank; never more than the largest of the Linears can have.
        density: share of entries that TIES keeps of each ``dW``, and that DARE keeps with that probability.
        seed: of DARE's masks; each Linear has its own, whatever else is merged.

    Raises:
        AdapterError: an unknown method, weights that do not fit, numbers that are not finite, ``factors`` for adapters that do
            not share their A.
    """
    _check(method, rank, density)
    _check_finite(adapters)
    table = _weights(adapters, weights, 1.0 if method == "task_arithmetic" else 1 / len(adapters))
    if method == "factors":
        return _factors(adapters, table)
    if method == "cat":
        return _joined(adapters, table)
    if method in ("weighted", "task_arithmetic"):
        return _sum(adapters, table, rank)
    return _dense(adapters, table, rank or len(adapters) * adapters.spec.rank, _combiner(method, density, seed))


def _check(method: str, rank: int | None, density: float) -> None:
    if method not in METHODS:
        raise AdapterError(f"no merge method is called '{method}'{did_you_mean(method, METHODS)}; there are {', '.join(METHODS)}")
    if rank is not None and rank < 1:
        raise AdapterError(f"rank is {rank}, and must be at least 1")
    if rank is not None and method in ("cat", "factors"):
        raise AdapterError(f"`{method}` does not decompose, so it takes no rank: use `weighted`, which gives the best adapter of a rank")
    if not 0 < density <= 1:
        raise AdapterError(f"density is {density:g}, and must be above 0 and at most 1")


def _check_finite(adapters: Adapters) -> None:
    for site in adapters.spec.sites:
        whole = adapters.A[site.name].isfinite().flatten(1).all(1) & adapters.B[site.name].isfinite().flatten(1).all(1)
        if not whole.all():
            broken = int((~whole).nonzero()[0])
            raise AdapterError(f"adapter {broken} holds numbers in {site.name} that are not finite: leave it out of the merge")


def _weights(adapters: Adapters, weights: Tensor | Sequence[float] | None, default: float) -> Tensor:
    """``[M, N]``."""
    like = low_rank.widened(adapters.tensors()[0])
    if weights is None:
        return like.new_full((1, len(adapters)), default)
    table = torch.atleast_2d(torch.as_tensor(weights)).to(like)
    if table.ndim != 2 or table.shape[1] != len(adapters):
        raise AdapterError(f"weights are {list(table.shape[-1:])}, and there are {len(adapters)} adapters: one weight is needed for each")
    if not table.isfinite().all():
        raise AdapterError("weights must be finite numbers, one for each adapter; found an infinite one or NaN")
    return table


def _rank_joined(adapters: Adapters, table_MN: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """``A [M, L, N * R, I]``, ``B [M, L, O, N * R]`` whose product is ``sum_n w_mn dW_n``."""
    A, B = low_rank.widened(adapters.A[name]), low_rank.widened(adapters.B[name]) * adapters.spec.scale
    joined_A = A.movedim(0, 1).flatten(1, 2).expand(len(table_MN), -1, -1, -1)
    weighted_B = table_MN[:, :, None, None, None] * B
    return joined_A, weighted_B.movedim(1, -2).flatten(-2)


def _joined(adapters: Adapters, table_MN: Tensor) -> Merged:
    parts = {site.name: _rank_joined(adapters, table_MN, site.name) for site in adapters.spec.sites}
    return _merged(adapters.spec, parts, {name: A.new_ones(A.shape[:2]) for name, (A, _) in parts.items()})


def _factors(adapters: Adapters, table_MN: Tensor) -> Merged:
    if not shared_gauge(adapters):
        raise AdapterError(
            f"factors cannot be averaged: the A of these adapters differ by up to {gauge_gap(adapters):.1%}, so averages of A and of B "
            "multiply to cross terms, and the result is no average of the adapters. Use `weighted`, which is exact for any adapters"
        )
    count = len(table_MN)
    A = {name: factor[:1].expand(count, -1, -1, -1).clone() for name, factor in adapters.A.items()}
    B = {name: torch.einsum("mn,nlor->mlor", table_MN, low_rank.widened(factor)) for name, factor in adapters.B.items()}
    energy = {site.name: table_MN.new_ones(count, len(site.layers)) for site in adapters.spec.sites}
    return Merged(replace(adapters, A=A, B=B), energy)


def _sum(adapters: Adapters, table_MN: Tensor, rank: int | None) -> Merged:
    decomposed = {}
    needed = 1
    for site in adapters.spec.sites:
        A, B = _rank_joined(adapters, table_MN, site.name)
        decomposed[site.name] = low_rank.product_svd(A.double(), B.double())
        S = decomposed[site.name][1]
        # What falls below is rounding of the factors: copies of one adapter in several gauges come back at its own rank.
        noise = 8 * torch.finfo(A.dtype).eps * S[..., :1]
        needed = max(needed, int((noise < S).sum(-1).max()))
    wanted = needed if rank is None else min(rank, max(S.shape[-1] for _, S, _ in decomposed.values()))
    dtype = table_MN.dtype
    parts, energy = {}, {}
    for name, (U, S, Vt) in decomposed.items():
        parts[name] = _cut(U, S, Vt, wanted, dtype)
        energy[name] = _share(S[..., :wanted].square().sum(-1), S.square().sum(-1)).to(dtype)
    return _merged(adapters.spec, parts, energy)


def _dense(adapters: Adapters, table_MN: Tensor, rank: int, combine: Callable[[Tensor, Tensor, str], Tensor]) -> Merged:
    rank = min(rank, max(min(site.in_features, site.out_features) for site in adapters.spec.sites))
    parts, energy = {}, {}
    for site in adapters.spec.sites:
        rows = [_dense_row(adapters, table_MN, site, row, rank, combine) for row in range(len(site.layers))]
        A, B, kept = (torch.stack(part, 1) for part in zip(*rows, strict=True))
        parts[site.name], energy[site.name] = (A, B), kept
    return _merged(adapters.spec, parts, energy)


def _dense_row(
    adapters: Adapters, table_MN: Tensor, site: Site, row: int, rank: int, combine: Callable[[Tensor, Tensor, str], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """One Linear: ``A [M, rank, I]``, ``B [M, O, rank]``, ``energy [M]``.  Only here is ``dW`` formed, of all N adapters."""
    A, B = low_rank.widened(adapters.A[site.name][:, row]), low_rank.widened(adapters.B[site.name][:, row])
    dW_NOI = adapters.spec.scale * (B @ A)
    found = []
    for weights_N in table_MN:
        merged_OI = combine(dW_NOI, weights_N, site.paths()[row])
        U, S, Vt = _leading(merged_OI, rank)
        found.append((*_cut(U, S, Vt, rank, A.dtype), _share(S.square().sum(-1), merged_OI.square().sum())))
    return tuple(torch.stack(part) for part in zip(*found, strict=True))


def _combiner(method: str, density: float, seed: int) -> Callable[[Tensor, Tensor, str], Tensor]:
    """``(dW [N, O, I], weights [N], path) -> [O, I]``."""

    def combine(dW_NOI: Tensor, weights_N: Tensor, path: str) -> Tensor:
        sparse = _largest(dW_NOI, density) if method == "ties" else _dropped(dW_NOI, density, f"{seed}/{path}")
        weighted = weights_N[:, None, None] * sparse
        return weighted.sum(0) if method == "dare_linear" else _elected(weighted, weights_N)

    return combine


def _largest(dW_NOI: Tensor, density: float) -> Tensor:
    """The share of entries with the largest magnitude, for each adapter; all that tie with the smallest of them stay."""
    sizes = dW_NOI.abs().flatten(1)
    left_out = sizes.shape[1] - max(1, round(density * sizes.shape[1]))
    threshold = sizes.kthvalue(left_out + 1, dim=1).values[:, None, None]
    return torch.where(dW_NOI.abs() >= threshold, dW_NOI, 0)


def _dropped(dW_NOI: Tensor, density: float, seed: str) -> Tensor:
    """Each entry kept with probability ``density`` and divided by it; the masks are drawn on the CPU, the same for every device."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    kept = torch.rand(dW_NOI.shape, generator=generator).to(dW_NOI.device) < density
    return torch.where(kept, dW_NOI / density, 0)


def _elected(weighted_NOI: Tensor, weights_N: Tensor) -> Tensor:
    """The mean of the entries whose sign is that of the sum, by their weights."""
    agrees = (weighted_NOI.sign() == weighted_NOI.sum(0).sign()) & (weighted_NOI != 0)
    voters = (agrees * weights_N.abs()[:, None, None]).sum(0)
    total = torch.where(agrees, weighted_NOI, 0).sum(0)
    return torch.where(voters > 0, total / torch.where(voters > 0, voters, 1), 0)


def _leading(dense_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading ``rank`` singular triples; of a large matrix by subspace iteration from a fixed start."""
    if min(dense_OI.shape) <= max(_EXACT_SIDE, 2 * rank):
        U, S, Vt = torch.linalg.svd(dense_OI, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[dense_OI.device] if dense_OI.is_cuda else []):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(dense_OI, q=rank + _OVERSAMPLING, niter=_POWER_ITERATIONS)
        Vt = V.mT
    return U[..., :rank], S[..., :rank], Vt[..., :rank, :]


def _cut(U: Tensor, S: Tensor, Vt: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors of exactly this rank: the leading triples, filled with zeros where a Linear has fewer."""
    A, B = low_rank.balanced(U[..., :rank], S[..., :rank], Vt[..., :rank, :])
    return low_rank.filled(A, -2, rank).to(dtype), low_rank.filled(B, -1, rank).to(dtype)


def _share(kept: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, kept / torch.where(whole > 0, whole, 1), 1).clamp(max=1)


def _merged(spec: AdapterSpec, parts: Mapping[str, tuple[Tensor, Tensor]], energy: Mapping[str, Tensor]) -> Merged:
    rank = next(iter(parts.values()))[0].shape[-2]
    A, B = ({name: factors[which] for name, factors in parts.items()} for which in (0, 1))
    return Merged(Adapters(AdapterSpec(spec.sites, rank, alpha=rank), A, B), energy)
