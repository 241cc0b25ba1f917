"""Next-token cross-entropy on the labels."""

from __future__ import annotations

from torch import Tensor

from limbeck.config.parts.objectives import CrossEntropyOptions
from limbeck.ops.fused import linear_cross_entropy
from limbeck.types import Batch, LossTerm, Output, Signal


class CrossEntropy:
    """Summed over the positions whose prediction counts; asks nothing of a teacher."""

    name = "ce"

    def __init__(self, options: CrossEntropyOptions):
        self.weight, self.schedule = options.weight_at(0), options.schedule
        self.chunk = options.chunk

    def count(self, batch: Batch) -> Tensor:
        """Positions whose prediction counts."""
        return batch.label_mask_BT.sum()

    def __call__(self, output: Output, signal: Signal, batch: Batch) -> LossTerm:
        """Metrics: ``ce`` in nats a token, ``accuracy`` (the likeliest token is the label)."""
        loss, found = linear_cross_entropy(
            output.hidden_BTD.flatten(0, 1), output.head, batch.labels_BT.flatten(), chunk=self.chunk
        )
        return LossTerm(loss, {"ce": (found.kl, found.count), "accuracy": (found.agreement, found.count)})
