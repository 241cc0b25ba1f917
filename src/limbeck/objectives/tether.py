"""A tether to the base: on the probes' tokens the adapted model's distribution stays near the base's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from limbeck.adapters.deltas import DeltaSignal, Probes
from limbeck.adapters.output import AdaptedOutput
from limbeck.config.parts.objectives import TetherOptions
from limbeck.needs import Deltas
from limbeck.objectives.adapted import rows_that_count
from limbeck.objectives.delta import ProbedObjective
from limbeck.ops.fused import linear_kl
from limbeck.types import Batch, LossTerm, Output, Signal


class Tether(ProbedObjective):
    """KL(base || adapted) a probe token; each adapter counts as one."""

    name = "tether"

    def __init__(self, options: TetherOptions):
        super().__init__(options)
        self.chunk = options.chunk
        self._base_KTD: Tensor | None = None

    def __call__(self, output: Output | AdaptedOutput, signal: Signal, batch: Batch) -> LossTerm:
        """Metrics: ``tether``, in nats a probe token."""
        adapted, counts = self.adapted(output), rows_that_count(batch)
        wanted: DeltaSignal = signal[Deltas]
        probes = wanted.probes
        with self.compute(batch.input_ids_BT.device):
            if self._base_KTD is None:
                with torch.no_grad():
                    (self._base_KTD,) = adapted.run(probes.ids_KT, (-1,), True, None)
            rows = counts.nonzero().squeeze(1)
            if not len(rows):
                # Padding alone still runs the base, as other ranks do, and weighs nothing.
                return LossTerm(0 * self._lot(adapted, probes, counts.new_zeros(1, dtype=torch.int64)), {"tether": (0.0, counts.sum())})
            size = self.together or len(rows)
            total = self._base_KTD.new_zeros(())
            for lot in rows.split(size):
                if len(rows) > size:
                    total = total + checkpoint(self._lot, adapted, probes, lot, use_reentrant=False)
                else:
                    total = total + self._lot(adapted, probes, lot)
        loss = total / probes.mask_KT.sum()
        return LossTerm(loss, {"tether": (loss.detach(), counts.sum())})

    def _lot(self, adapted: AdaptedOutput, probes: Probes, rows: Tensor) -> Tensor:
        """Sum over the tokens of all probes with each of these rows' adapters."""
        assert self._base_KTD is not None
        count = len(rows)
        (states,) = adapted.run(probes.ids_KT.repeat(count, 1), (-1,), True, adapted.adapters.pick(rows))
        teacher = self._base_KTD.repeat(count, 1, 1).flatten(0, 1)
        loss, _ = linear_kl(states.flatten(0, 1), adapted.head, teacher, adapted.head, probes.mask_KT.repeat(count, 1).flatten(), chunk=self.chunk)
        return loss
