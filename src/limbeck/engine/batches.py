"""What the loop asks of its data, and how a step's rows become micro-batches."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from limbeck.config.parts.stages import LoopOptions
from limbeck.types import IGNORE, Batch


class Rows(Protocol):
    """Packed rows on disk."""

    @property
    def sequence(self) -> int:
        """Tokens a row."""
        ...

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def batch(self, indices: Any) -> Batch:
        """The rows with these numbers, on the CPU."""
        ...


class StepLoader(Protocol):
    """Gives this rank's rows of every step, and knows where it stands."""

    @property
    def rows(self) -> Rows:
        """What it reads."""
        ...

    @property
    def rows_per_step(self) -> int:
        """Rows of a step, over all ranks."""
        ...

    def next_step(self) -> Batch:
        """This rank's rows of the next step; fewer, even none, in the last step of an epoch."""
        ...

    def state(self) -> dict[str, int]:
        """The position of the next step."""
        ...

    def restore(self, state: dict[str, int]) -> None:
        """Go on from a position."""
        ...


def num_steps(options: LoopOptions, loader: StepLoader) -> int:
    """Optimiser steps that a budget in tokens, steps, samples or epochs comes to."""
    rows = loader.rows_per_step
    if options.steps is not None:
        return options.steps
    if options.tokens is not None:
        return math.ceil(options.tokens / (rows * loader.rows.sequence))
    if options.samples is not None:
        return math.ceil(options.samples / rows)
    assert options.epochs is not None
    return max(1, round(options.epochs * math.ceil(len(loader.rows) / rows)))


def split(batch: Batch, size: int | None) -> list[Batch]:
    """Micro-batches of at most ``size`` rows (all of them by default); none for a batch without rows."""
    rows = batch.input_ids_BT.shape[0]
    return batch.split(size or rows) if rows else []


def padding_like(batch: Batch) -> Batch:
    """A micro-batch in which nothing counts: for a rank that has fewer rows than the others but must join every collective."""
    positions_BT = torch.arange(batch.input_ids_BT.shape[1]).expand(1, -1)

    def none_of(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.new_full((1, *part.shape[1:]), -1)

    return Batch(
        input_ids_BT=torch.zeros_like(positions_BT),
        labels_BT=torch.full_like(positions_BT, IGNORE),
        position_ids_BT=positions_BT.clone(),
        documents_BT=torch.full_like(positions_BT, -1),
        adapters_B=none_of(batch.adapters_B),
        condition_BSC=none_of(batch.condition_BSC),
    )
