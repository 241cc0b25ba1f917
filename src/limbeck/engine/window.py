"""Numbers of the steps since the last logged line, left on the device until they are written."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from limbeck.engine.parallel import World
from limbeck.engine.step import Metrics


@dataclass
class Window:
    """Sums since the last line; nothing here waits for the device before :meth:`fetch`."""

    losses: list[Tensor] = field(default_factory=list)
    """This rank's share of each step's loss, scalars."""
    metrics: Metrics = field(default_factory=dict)
    tokens: int = 0
    teacher_seconds: float = 0.0
    norm: float = math.nan
    rates: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def add(self, metrics: Metrics) -> Tensor | float:
        """Add one micro-batch; returns its share of the step's loss."""
        loss = metrics.pop("loss", (0.0, 0))[0]
        for name, (total, count) in metrics.items():
            held = self.metrics.get(name, (0.0, 0))
            self.metrics[name] = (held[0] + total, held[1] + count)
        return loss

    def fetch(self, world: World) -> tuple[dict[str, float], list[float]]:
        """Metrics (sums over ranks, divided by their counts) and the loss of every step, in one transfer."""
        names = sorted(self.metrics)
        values = [*self.losses, *(part for name in names for part in self.metrics[name])]
        if not values:
            return {}, []
        on_device = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=world.device) for v in values])
        numbers = world.sum(on_device.cpu()).tolist()
        losses, rest = numbers[: len(self.losses)], numbers[len(self.losses) :]
        pairs = zip(names, rest[::2], rest[1::2], strict=True)
        return {name: total / count if count else math.nan for name, total, count in pairs}, losses
