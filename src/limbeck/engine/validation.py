"""Losses on held-out rows, without touching the training."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from limbeck.engine.batches import Rows, padding_like
from limbeck.engine.determinism import untouched_rng
from limbeck.engine.parallel import World, release_teacher
from limbeck.engine.precision import autocast
from limbeck.engine.step import TrainStep
from limbeck.engine.window import Window
from limbeck.types import Batch


def held_out_batches(rows: Rows, wanted: int, size: int, world: World) -> Iterator[Batch]:
    """This rank's micro-batches of at most ``size`` rows out of the first ``wanted``; every rank yields as many."""
    for start in range(0, wanted, size * world.size):
        mine = np.arange(start + world.rank * size, min(start + (world.rank + 1) * size, wanted))
        yield rows.batch(mine) if len(mine) else padding_like(rows.batch(np.arange(1)))


def validate(step: TrainStep, rows: Rows, *, wanted: int, size: int, world: World, precision: str) -> dict[str, float]:
    """Every metric over ``wanted`` rows, in evaluation mode; ``loss`` is the weighted sum of the objectives.

    Random streams and the module's mode are left as they were.
    """
    window = Window()
    step.eval()
    with untouched_rng(), torch.no_grad(), autocast(world.device, precision):
        for batch in held_out_batches(rows, min(wanted, len(rows)), size, world):
            batch, signal = step.answer(batch.to(world.device))
            window.add(step.run(batch, signal.to(world.device), [0.0] * len(step.objectives)))
            release_teacher(step)
    step.train()
    values, _ = window.fetch(world)
    return {"loss": sum(values[f"{label}/weighted"] for label in step.labels), **values}
