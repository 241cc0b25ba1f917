"""Delta embeddings: what an adapter does to the base's hidden states on probes.

``v(M)`` is read of a model on K probes and ``delta = v(M) - v(base)``, in fp32 (Delta Activations, Xu et al. 2025, with more ways of
reading).  Measuring and matching share this code, so that a target and its prediction cannot mean different things.

Shape legend: N adapters, K probes, T tokens, D width of the states, F numbers of a delta.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from limbeck.adapters.output import RunBase
from limbeck.adapters.spec import Adapters
from limbeck.config.parts.adapters import RepresentationOptions
from limbeck.ops.low_rank import widened
from limbeck.ops.projection import next_log_probabilities
from limbeck.types import Head


@dataclass(frozen=True)
class Probes:
    """K texts, right-padded: ``ids_KT`` int64 (0 on padding) and ``mask_KT`` bool.

    For likelihoods, ``scored_KT`` is True at the tokens of a continuation, which the tokens before them predict.
    """

    ids_KT: Tensor
    mask_KT: Tensor
    scored_KT: Tensor | None = None

    def __len__(self) -> int:
        """Number of probes."""
        return len(self.ids_KT)

    def to(self, device: torch.device | str) -> Probes:
        """On another device."""
        scored = None if self.scored_KT is None else self.scored_KT.to(device)
        return Probes(self.ids_KT.to(device), self.mask_KT.to(device), scored)


@dataclass(frozen=True)
class DeltaSignal:
    """``signal[Deltas]``: the teachers' deltas of a batch's rows ``[B, F]`` (fp32), and how to make the student's."""

    target_BF: Tensor
    probes: Probes
    represent: RepresentationOptions

    def to(self, device: torch.device | str) -> DeltaSignal:
        """On another device."""
        return DeltaSignal(self.target_BF.to(device), self.probes.to(device), self.represent)


def represent(states: Sequence[Tensor], probes: Probes, options: RepresentationOptions) -> Tensor:
    """``[N, F]`` (fp32 at least) from each layer's states ``[N * K, T, D]`` on the K probes, those of one model together."""
    wide = [widened(s) for s in states]
    joined = torch.cat(wide, -1) if options.join == "concat" else torch.stack(wide).mean(0)
    if options.projection is not None:
        joined = joined @ projection(joined.shape[-1], options.projection).to(joined)
    x_NKTD = joined.unflatten(0, (-1, len(probes)))
    mask_KT1 = probes.mask_KT.unsqueeze(-1)
    if options.tokens == "all":
        x_NKF = (x_NKTD * mask_KT1).flatten(2)
    elif options.tokens == "mean":
        x_NKF = (x_NKTD * mask_KT1).sum(2) / mask_KT1.sum(1)
    else:
        last_K = probes.mask_KT.sum(-1) - 1
        x_NKF = x_NKTD[:, torch.arange(len(probes), device=last_K.device), last_K]
    return x_NKF.flatten(1) if options.per_probe else x_NKF.mean(1)


def projection(size: int, wanted: int) -> Tensor:
    """A fixed Gaussian matrix ``[size, wanted]`` that keeps lengths in the mean; the same on every machine."""
    generator = torch.Generator().manual_seed(size * 1_000_003 + wanted)
    return torch.randn(size, wanted, generator=generator) / wanted**0.5


def embed(
    run: RunBase,
    adapters: Adapters | None,
    probes: Probes,
    options: RepresentationOptions,
    *,
    together: int | None = None,
    head: Head | None = None,
) -> Tensor:
    """``v [N, F]`` of the base with each of N adapters (of the base alone, ``[1, F]``, for None).

    ``together`` adapters run at one time; with gradients the backward pass computes each lot again, so that the graph of one lot
    is alive at a time.  ``what: likelihoods`` needs the base's ``head``.
    """

    def lot(first: int, last: int) -> Tensor:
        chosen = None if adapters is None else adapters.pick(slice(first, last))
        ids = probes.ids_KT.repeat(last - first, 1)
        if options.what == "likelihoods":
            assert head is not None and probes.scored_KT is not None
            (states,) = run(ids, (-1,), True, chosen)
            found = next_log_probabilities(states, head, ids).unflatten(0, (-1, len(probes)))
            return (found * probes.scored_KT[:, 1:]).sum(-1)
        return represent(run(ids, options.layers, options.final_norm, chosen), probes, options)

    count = 1 if adapters is None else len(adapters)
    size = min(together or count, count)
    if size == count:
        return lot(0, count)
    parts = [(first, min(first + size, count)) for first in range(0, count, size)]
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(lot, *part, use_reentrant=False) for part in parts])
    return torch.cat([lot(*part) for part in parts])


def measured(
    run: RunBase,
    adapters: Adapters,
    wanted: Sequence[int],
    probes: Probes,
    options: RepresentationOptions,
    base_1F: Tensor,
    *,
    together: int,
    head: Head | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """The deltas ``[lot, F]`` of the wanted adapters, ``together`` at a time, with their numbers.

    Every lot has the same shape (the last adapter fills it up), so that a delta's bits do not depend on which others are wanted.
    """
    size = min(together, len(adapters))
    for start in range(0, len(wanted), size):
        lot = list(wanted[start : start + size])
        filled = adapters.pick([*lot, *[lot[-1]] * (size - len(lot))]).to(probes.ids_KT.device)
        yield lot, (embed(run, filled, probes, options, head=head) - base_1F)[: len(lot)]


def relative_error(found_NF: Tensor, target_NF: Tensor) -> Tensor:
    """``|found - target|^2 / |target|^2`` of N deltas of F numbers, ``[N]``; a target of zero counts as one of the smallest
    normal size."""
    tiny = torch.finfo(target_NF.dtype).tiny
    return (found_NF - target_NF).square().sum(-1) / target_NF.square().sum(-1).clamp_min(tiny)
