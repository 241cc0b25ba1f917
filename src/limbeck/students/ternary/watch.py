"""What ternary codes do while they train: how many change, how many are zero, how far the scales move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from limbeck.ops.ternary import Ternary
from limbeck.students.ternary.modules import Quantised
from limbeck.types import Metric

SAMPLE = 2**16
"""Codes of each weight that are remembered, evenly spread: a share of them is known to a fraction of a percent."""


class CodeWatch:
    """Compares the codes with those of the last call.

    One pass of quantising a call, and a sample of the codes is kept, not all of them.  ``ternary/flips`` is the share of codes that
    changed, ``ternary/zeros`` the share that is 0, ``ternary/scale_drift`` the summed change of the scales by their sum.  The first two calls
    after a run was resumed are apart by fewer steps than others.
    """

    def __init__(self, weights: Sequence[tuple[str, Quantised, str]]):
        self.weights = list(weights)
        self._before = {path: self._sample(_codes(module, name)) for path, module, name in self.weights}

    def measure(self) -> dict[str, Metric]:
        """Flips, zeros and drift since the last call, as ``(sum, count)`` of this rank's weights."""
        totals: dict[str, list[Any]] = {"ternary/flips": [0.0, 0], "ternary/zeros": [0.0, 0], "ternary/scale_drift": [0.0, 0.0]}
        for path, module, name in self.weights:
            now = _codes(module, name)
            before, (codes, scales) = self._before[path], self._sample(now)
            found = {
                "ternary/flips": ((codes != before[0]).sum(), codes.numel()),
                "ternary/zeros": (now.codes.numel() - now.codes.count_nonzero(), now.codes.numel()),
                "ternary/scale_drift": ((scales - before[1]).abs().sum(), before[1].sum()),
            }
            for key, (part, count) in found.items():
                totals[key] = [totals[key][0] + part, totals[key][1] + count]
            self._before[path] = codes, scales
        return {key: (total, count) for key, (total, count) in totals.items()}

    @staticmethod
    def _sample(t: Ternary) -> tuple[Tensor, Tensor]:
        flat = t.codes.flatten()
        return flat[:: -(-flat.numel() // SAMPLE) or 1].clone(), t.scales.clone()


def _codes(module: Quantised, name: str) -> Ternary:
    """Codes of this rank's rows or experts; of the whole weight, on every rank, where a scale reaches over ranks."""
    weight: Any = getattr(module, name)
    learnt: Any = module.learnt(name)
    if not isinstance(weight, DTensor):
        return module.codes(name)
    alone = module.quantiser.scale in ("row", "group") or (module.quantiser.scale == "expert" and weight.ndim == 3)
    weight, learnt = (None if p is None else p.detach().to_local() if alone else p.detach().full_tensor() for p in (weight, learnt))
    if weight.numel() == 0:
        return Ternary(torch.zeros(0, dtype=torch.int8, device=weight.device), torch.zeros(0, device=weight.device))
    return module.codes(name, weight, learnt)
