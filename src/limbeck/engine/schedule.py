"""Learning rate over a run, as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from limbeck.config.parts.stages import ScheduleOptions


def factor(options: ScheduleOptions, step: int, num_steps: int) -> float:
    """Factor of each group's peak learning rate for the update number ``step`` (from 0) of ``num_steps``.

    Linear warm-up reaches 1 at step ``warmup``; ``cosine`` and ``wsd`` then end at ``final`` on the last step.
    """
    if step < options.warmup:
        return (step + 1) / (options.warmup + 1)
    if options.kind == "constant":
        return 1.0
    start = options.warmup if options.kind == "cosine" else max(options.warmup, num_steps - math.ceil(options.decay * num_steps))
    if step < start:
        return 1.0
    progress = min(1.0, (step - start) / max(1, num_steps - 1 - start))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if options.kind == "cosine" else 1 - progress
    return options.final + (1 - options.final) * shape
