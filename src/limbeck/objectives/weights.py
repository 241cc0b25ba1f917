"""Supervision by the teacher adapter's own weights."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.adapters.gauge import canonical, norms
from limbeck.adapters.output import AdaptedOutput
from limbeck.adapters.spec import Adapters, AdapterSpec, check_same_spec
from limbeck.config.parts.objectives import WeightsOptions
from limbeck.errors import AdapterError
from limbeck.needs import AdapterFactors, InputMoments
from limbeck.objectives.adapted import AdapterObjective, rows_that_count
from limbeck.ops.low_rank import squared_distance
from limbeck.types import Batch, LossTerm, Output, Signal


class Weights(AdapterObjective):
    """One number an adapter: an error relative to the teacher's size (products), or a mean square (factors)."""

    name = "weights"

    def __init__(self, options: WeightsOptions):
        super().__init__(options)
        self.loss = options.loss

    def __call__(self, output: Output | AdaptedOutput, signal: Signal, batch: Batch) -> LossTerm:
        """Metrics: ``lora_ratio``, the size of the generated dW over the teacher's."""
        found, counts = self.adapted(output).adapters, rows_that_count(batch)
        teacher: Adapters = signal[AdapterFactors]
        with torch.autocast(batch.input_ids_BT.device.type, enabled=False):
            if self.loss in ("mse", "canonical"):
                self._check_factors(found.spec, teacher.spec)
                wanted = canonical(teacher) if self.loss == "canonical" else teacher
                names = [site.name for site in found.spec.sites]
                pairs = [pair for name in names for pair in ((found.A[name], wanted.A[name]), (found.B[name], wanted.B[name]))]
                squares = torch.stack([(a - b).square().flatten(1).sum(-1) for a, b in pairs]).sum(0)
                term = squares / sum(a[0].numel() for a, _ in pairs)
            else:
                term = relative_distance(found, teacher, signal.get(InputMoments) if self.loss == "whitened" else None)
            tiny = torch.finfo(torch.float32).tiny
            ratio = norms(found.detach()) / norms(teacher).clamp_min(tiny)
        zero = torch.zeros_like(term)
        return LossTerm(torch.where(counts, term, zero).sum(), {"lora_ratio": (torch.where(counts, ratio, zero).sum(), counts.sum())})

    def _check_factors(self, found: AdapterSpec, teacher: AdapterSpec) -> None:
        """Factors can be compared number by number if all of them have one shape and one scale."""
        check_same_spec([found, teacher], sites_only=True)
        if (found.rank, found.scale) != (teacher.rank, teacher.scale):
            raise AdapterError(
                f"objective 'weights' with loss '{self.loss}' compares A and B, and the generator's have rank {found.rank} and scale {found.scale:g}, its "
                f"teachers' rank {teacher.rank} and scale {teacher.scale:g}: give the generator the same, or set `loss: product`"
            )


def relative_distance(found: Adapters, teacher: Adapters, moments: dict[str, Tensor] | None = None) -> Tensor:
    """``|dW_found - dW_teacher|^2 / |dW_teacher|^2`` over all sites and layers together, ``[N]``; ranks may differ.

    ``moments[name] [L, I, I]`` weigh inputs by how often the Linears see them.
    """
    check_same_spec([found.spec, teacher.spec], sites_only=True)
    scale, target = found.spec.scale, teacher.spec.scale
    total = torch.zeros(len(found), device=found.tensors()[0].device)
    for site in found.spec.sites:
        name = site.name
        distances = squared_distance(
            found.A[name], found.B[name] * scale, teacher.A[name], teacher.B[name] * target, None if moments is None else moments[name]
        )
        total = total + distances.sum(-1)
    size = norms(teacher, moments).square()
    return total / size.clamp_min(torch.finfo(size.dtype).tiny)
