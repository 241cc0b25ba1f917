"""The size of generated adapters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from limbeck.adapters.gauge import site_norms
from limbeck.adapters.output import AdaptedOutput
from limbeck.config.parts.objectives import NormPenaltyOptions
from limbeck.objectives.adapted import AdapterObjective, rows_that_count
from limbeck.ops.low_rank import root
from limbeck.types import Batch, LossTerm, Output, Signal


class NormPenalty(AdapterObjective):
    """Keeps generated adapters small."""

    name = "norm_penalty"

    def __init__(self, options: NormPenaltyOptions):
        super().__init__(options)
        self.of = options.of

    def __call__(self, output: Output | AdaptedOutput, signal: Signal, batch: Batch) -> LossTerm:
        """Metrics: ``lora_norm``, the Frobenius norm of dW, of all and of each site (``lora_norm/SITE``)."""
        adapters, counts = self.adapted(output).adapters, rows_that_count(batch)
        sites = {name: root(found.square().sum(1)) for name, found in site_norms(adapters).items()}
        size = root(torch.stack([found.square() for found in sites.values()]).sum(0))
        if self.of == "factors":
            term = mean_square(adapters.A.values()) + mean_square(adapters.B.values())
        else:
            term = size.square() / sum(len(site.layers) * site.in_features * site.out_features for site in adapters.spec.sites)
        zero = torch.zeros_like(term)
        logged = {"lora_norm": size, **{f"lora_norm/{name}": found for name, found in sites.items()}}
        metrics = {name: (torch.where(counts, found.detach(), zero).sum(), counts.sum()) for name, found in logged.items()}
        return LossTerm(torch.where(counts, term, zero).sum(), metrics)


def mean_square(tensors: Iterable[Tensor]) -> Tensor:
    """Mean of the squares of all numbers of each adapter in ``[N, ...]`` tensors, ``[N]``."""
    parts = list(tensors)
    return torch.stack([part.square().flatten(1).sum(-1) for part in parts]).sum(0) / sum(part[0].numel() for part in parts)

