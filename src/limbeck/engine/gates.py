"""Whether a stage's result is good enough for the next one to start."""

from __future__ import annotations

import math
from pathlib import Path

from limbeck.config.parts.stages import StopUnless
from limbeck.engine.metrics import loss_trace
from limbeck.engine.parallel import World
from limbeck.errors import RunError

_WAYS_OUT = "train longer, change the learning rate, or take `stop_unless` out to go on all the same"

def _mean(values: list[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]  # skipped steps have no loss
    return math.fsum(finite) / len(finite) if finite else math.nan


def check_gate(metrics: Path, gate: StopUnless | None, world: World) -> float:
    """Mean loss of the last tenth of the steps; raises :class:`RunError` when it does not pass ``gate``."""
    world.barrier()
    trace = loss_trace(metrics)
    tenth = max(1, len(trace) // 10)
    first, last = _mean(trace[:tenth]), _mean(trace[-tenth:])
    if gate is not None and gate.loss == "decreases" and not last < first:
        raise RunError(
            f"stop_unless.loss: the loss must decrease, and went from {first:.4f} (first tenth) to {last:.4f} (last tenth): "
            f"{_WAYS_OUT}"
        )
    if gate is not None and gate.below is not None and not last < gate.below:
        raise RunError(f"stop_unless.below: the loss must end below {gate.below:g}, and its last tenth has mean {last:.4f}: {_WAYS_OUT}")
    return last
