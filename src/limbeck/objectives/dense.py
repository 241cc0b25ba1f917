"""What the divergences from a teacher with hidden states and head have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from limbeck.config.parts.objectives import DivergenceOptions
from limbeck.needs import HeadHidden
from limbeck.types import Batch, LossTerm, Output, Signal


class DenseDivergence:
    """Summed over the positions whose prediction counts and which the teacher answered, times the temperature squared."""

    name: str
    _operator: Callable[..., Any]

    def __init__(self, options: DivergenceOptions, **settings: float):
        self.weight, self.schedule = options.weight_at(0), options.schedule
        self._settings = {"temperature": options.temperature, "chunk": options.chunk, **settings}

    def count(self, batch: Batch) -> Tensor:
        """Positions whose prediction counts and which the teacher answered."""
        return batch.signal_mask_BT.sum()

    def __call__(self, output: Output, signal: Signal, batch: Batch) -> LossTerm:
        """Metrics: the divergence in nats a token at the loss's temperature (without its square), ``agreement`` of the top ids."""
        teacher: Output = signal[HeadHidden]
        loss, found = type(self)._operator(
            output.hidden_BTD.flatten(0, 1),
            output.head,
            teacher.hidden_BTD.flatten(0, 1),
            teacher.head,
            batch.signal_mask_BT.flatten(),
            **self._settings,
        )
        return LossTerm(loss, {self.name: (found.kl, found.count), "agreement": (found.agreement, found.count)})
