"""The canary: one batch that is scored when a checkpoint is written, and again when it has been read.

Hashes show that the files are what was written.  That they went to the right places, in a model whose frozen part, code and
libraries still give the same numbers, only a forward pass shows.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from limbeck.engine.batches import StepLoader, padding_like, split
from limbeck.engine.determinism import untouched_rng
from limbeck.engine.parallel import World, release_teacher
from limbeck.engine.precision import autocast
from limbeck.engine.step import TrainStep
from limbeck.types import Batch

SAME, OTHER = 1e-6, 1e-3
"""Relative difference of two scores that are one: with deterministic kernels on the same ranks, threads, device and versions, and
elsewhere."""


class Canary:
    """Scores the first rows that a run ever reads; the first rank's are the same on any number of ranks."""

    def __init__(self, loader: StepLoader, *, world: World, precision: str, rows: int = 1):
        """``loader`` stands at its beginning, and is left there."""
        self.world, self.precision = world, precision
        position = loader.state()
        first = loader.next_step()
        loader.restore(position)
        self.batch: Batch = next(iter(split(first, rows)), None) or padding_like(first)

    def score(self, step: TrainStep, at: int) -> float | None:
        """Mean loss on the first rank's rows as the student is after ``at`` steps; None where that is no number.

        Leaves modes and random streams as they were.
        """
        training = step.training
        # Whatever follows the step stays where the last one left it: what is saved beside this must not move.
        step.weights(max(0, at - 1))
        step.eval()
        batch = self.batch.to(self.world.device)
        with untouched_rng(), torch.no_grad(), autocast(self.world.device, self.precision):
            mine = float(step.score(batch)) / max(1, int(batch.label_mask_BT.sum()))
        release_teacher(step)
        step.train(training)
        agreed = float(self.world.sum(torch.tensor(mine if self.world.rank == 0 else 0.0, dtype=torch.float64)))
        return agreed if math.isfinite(agreed) else None

    def conditions(self, exact: bool) -> list[Any]:
        """What must be the same for two scores to be the same to the last digits."""
        return [self.world.size, str(self.world.device.type), torch.get_num_threads(), torch.__version__, self.precision, exact]


def changed(saved: float | None, found: float | None, *, alike: bool) -> str | None:
    """How a score differs from the one that was saved, or None."""
    bound = SAME if alike else OTHER
    if saved == found or (saved is not None and found is not None and math.isclose(saved, found, rel_tol=bound, abs_tol=bound)):
        return None
    before, now = ("no finite one" if value is None else f"{value:.7g}" for value in (saved, found))
    return f"its first rows had loss {before} when it was saved and have {now} now (at most {bound:g} apart is rounding)"
