"""Which rows a step trains on: a pure function of the seed, the epoch and the position in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from limbeck.errors import DataError
from limbeck.types import Batch


class Rows(Protocol):
    """Packed rows: what :class:`~limbeck.data.dataset.TokenRows` is."""

    @property
    def sequence(self) -> int:
        """Tokens a row."""
        ...

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Rows by number."""
        ...


class Loader:
    """Deals the rows out to steps and ranks.

    Each epoch is a permutation of all rows by ``(seed, epoch)``; a step takes the next ``rows_per_step`` of it (the last step of
    an epoch what is left) and every rank its contiguous part.  The rows of a step do not depend on the number of ranks, and the
    position is two integers, so that resuming is exact and another ``world`` may go on.
    """

    def __init__(self, rows: Rows, rows_per_step: int, *, seed: int, rank: int = 0, world: int = 1):
        """Start at the beginning of epoch 0.

        Raises:
            DataError: no rows, or a step that cannot be shared out evenly.
        """
        if not len(rows):
            raise DataError("there are no training rows: the prepared text is empty")
        if rows_per_step < 1 or rows_per_step % world:
            raise DataError(
                f"{rows_per_step} rows a step cannot be shared out evenly to {world} processes: set loop.batch_tokens to a "
                f"multiple of {world} x sequence = {world * rows.sequence}"
            )
        self.rows = rows
        self.rows_per_step = rows_per_step
        self.seed, self.rank, self.world = seed, rank, world
        self.epoch = 0
        self._row = 0
        self._order = self._permutation(0)

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))

    def next_step(self) -> Batch:
        """This rank's rows of the next step; fewer, even none, in the last step of an epoch."""
        if self._row >= len(self.rows):
            self.epoch, self._row = self.epoch + 1, 0
            self._order = self._permutation(self.epoch)
        step = self._order[self._row : self._row + self.rows_per_step]
        self._row += len(step)
        return self.rows.batch(np.array_split(step, self.world)[self.rank])

    def state(self) -> dict[str, int]:
        """The position of the next step, and how many rows an epoch had."""
        return {"epoch": self.epoch, "row": self._row, "rows": len(self.rows)}

    def restore(self, state: dict[str, int]) -> None:
        """Go on from a position.

        Raises:
            DataError: it was taken on other data.
        """
        if state["rows"] != len(self.rows):
            raise DataError(
                f"the checkpoint was taken on data of {state['rows']} rows and these have {len(self.rows)}: resume with the same "
                "data, or start afresh"
            )
        self.epoch, self._row = state["epoch"], state["row"]
        self._order = self._permutation(self.epoch)
