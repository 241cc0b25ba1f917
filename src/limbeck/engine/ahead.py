"""The next steps' rows, cut into micro-batches, with the teacher's answers to them on their way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from limbeck.engine.batches import StepLoader, split
from limbeck.engine.step import TrainStep
from limbeck.types import Batch, Pending, Signal

PATIENCE = 0.25
"""Seconds between two looks at whether the run is to stop, while a teacher is waited for."""


@dataclass(frozen=True)
class Upcoming:
    """One step: where the loader stood before it, its rows, and what was asked of a teacher that answers later."""

    position: dict[str, int]
    rows: Batch
    parts: list[Batch]
    pending: list[Pending | None]

    def answers(self, stopping: Callable[[], bool]) -> list[tuple[Batch, Signal | None]] | None:
        """Micro-batches with the answers that were waited for here; None where the teacher is asked when it is needed.

        Nothing at all if the run is to stop: a teacher that is away must not keep a run from being saved.
        """
        found: list[tuple[Batch, Signal | None]] = []
        for part, pending in zip(self.parts, self.pending, strict=True):
            while pending is not None:
                try:
                    found.append(pending.result(timeout=PATIENCE))
                    break
                except TimeoutError:
                    if stopping():
                        return None
            else:
                found.append((part, None))
        return found


class StepQueue:
    """Fetches at most ``num_steps`` steps, ``lookahead`` of them before their turn if the teacher takes questions early."""

    def __init__(self, loader: StepLoader, step: TrainStep, *, microbatch: int | None, num_steps: int):
        self._loader, self._step, self.microbatch = loader, step, microbatch
        self._left = num_steps
        self._steps: deque[Upcoming] = deque()
        self.lookahead = getattr(step.teacher, "lookahead", 1) if hasattr(step.teacher, "submit") else 0

    @property
    def position(self) -> dict[str, int]:
        """Where a run that goes on from here must begin to read."""
        return self._steps[0].position if self._steps else self._loader.state()

    def fill(self, steps: int) -> None:
        """Have so many steps under way, as far as there are any left."""
        while len(self._steps) < steps and self._left:
            self._left -= 1
            position, rows = self._loader.state(), self._loader.next_step()
            parts = split(rows, self.microbatch)
            self._steps.append(Upcoming(position, rows, parts, [self._step.submit(part) for part in parts]))

    def first(self) -> Upcoming:
        """The next step, still in the queue."""
        self.fill(1)
        return self._steps[0]

    def advance(self) -> None:
        """The first step is being done: what comes after it may be asked for."""
        self._steps.popleft()
        self.fill(self.lookahead)
