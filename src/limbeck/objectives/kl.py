"""Forward KL(teacher || student) over the whole vocabulary."""

from __future__ import annotations

from torch import Tensor

from limbeck.config.parts.objectives import ForwardKLOptions
from limbeck.needs import HeadHidden
from limbeck.ops.fused import linear_kl
from limbeck.types import Batch, LossTerm, Output, Signal


class ForwardKL:
    """Summed over the positions whose prediction counts, times the temperature squared."""

    name = "kl"

    def __init__(self, options: ForwardKLOptions):
        self.weight = options.weight
        self.temperature = options.temperature
        self.chunk = options.chunk

    def count(self, batch: Batch) -> Tensor:
        """Positions whose prediction counts."""
        return batch.label_mask_BT.sum()

    def __call__(self, output: Output, signal: Signal, batch: Batch) -> LossTerm:
        """Metrics: ``kl`` in nats a token at the loss's temperature (without its square), ``agreement`` of the top ids."""
        teacher: Output = signal[HeadHidden]
        loss, found = linear_kl(
            output.hidden_BTD.flatten(0, 1),
            output.head,
            teacher.hidden_BTD.flatten(0, 1),
            teacher.head,
            batch.label_mask_BT.flatten(),
            temperature=self.temperature,
            chunk=self.chunk,
        )
        return LossTerm(loss, {"kl": (found.kl, found.count), "agreement": (found.agreement, found.count)})
