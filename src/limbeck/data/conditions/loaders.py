"""Which rows a step trains on: as many of every condition, however long their texts are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from limbeck.data.conditions.rows import ConditionRows
from limbeck.errors import DataError
from limbeck.types import Batch


class _OwnOrders:
    """Slot ``s`` reads the rows of ``conditions[s]`` in an order of its own: a permutation by ``(seed, slot, epoch)``.

    What a slot reads depends on nothing but itself, and the position is the number of steps.
    """

    def __init__(self, rows: ConditionRows, conditions: Sequence[int], rows_per_step: int, *, seed: int, rank: int, world: int):
        if rows_per_step < 1 or rows_per_step % world:
            raise DataError(
                f"{rows_per_step} rows a step cannot be shared out evenly to {world} processes: choose a multiple of {world} (loop.batch_tokens, "
                "or loop.rows of a pool)"
            )
        self.rows = rows
        self.ranges = [rows.rows_of(condition) for condition in conditions]
        self.rows_per_step = rows_per_step
        self.seed, self.rank, self.world = seed, rank, world
        self._step = 0
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def _mine(self) -> np.ndarray:
        """This rank's places in a step."""
        return np.array_split(np.arange(self.rows_per_step), self.world)[self.rank]

    def _row(self, slot: int, turn: int) -> int:
        found = self.ranges[slot]
        epoch, place = divmod(turn, len(found))
        held = self._orders.get(slot)
        if held is None or held[0] != epoch:
            held = self._orders[slot] = (epoch, np.random.default_rng((self.seed, slot, epoch)).permutation(len(found)))
        return found.start + int(held[1][place])

    def state(self) -> dict[str, int]:
        """The position of the next step, and how many slots and rows there are."""
        return {"step": self._step, "slots": len(self.ranges), "rows": len(self.rows)}

    def restore(self, state: dict[str, int]) -> None:
        """Go on from a position.

        Raises:
            DataError: it was taken with other conditions.
        """
        if (state["slots"], state["rows"]) != (len(self.ranges), len(self.rows)):
            raise DataError(
                f"the checkpoint was taken with {state['slots']} slots on {state['rows']} rows, and these are {len(self.ranges)} on "
                f"{len(self.rows)}: resume with the same conditions, or start with --fresh"
            )
        self._step = state["step"]


class PoolLoader(_OwnOrders):
    """For a pool of adapters: in every step ``each`` rows of every slot.

    Rows of one slot stand together, slots ascend, and ``adapters_B`` of the batches are slots.
    """

    def __init__(self, rows: ConditionRows, conditions: Sequence[int], *, each: int, seed: int, rank: int = 0, world: int = 1):
        """``conditions[s]`` is the condition of slot ``s``.  Start at step 0.

        Raises:
            DataError: rows that cannot be shared out evenly to the processes.
        """
        super().__init__(rows, conditions, each * len(conditions), seed=seed, rank=rank, world=world)
        self.each = each

    def next_step(self) -> Batch:
        """This rank's rows of the next step."""
        slots, turns = np.divmod(self._mine(), self.each)
        turns = turns + self._step * self.each
        self._step += 1
        rows = [self._row(int(slot), int(turn)) for slot, turn in zip(slots, turns, strict=True)]
        return replace(self.rows.batch(rows), adapters_B=torch.from_numpy(slots.astype(np.int64)))


class ConditionLoader(_OwnOrders):
    """For a generator: one row of each condition in turn, the conditions in a new order by ``(seed, round)`` every round.

    Every condition weighs the same; a shuffle of all rows would weigh them by the length of their text.
    """

    def __init__(self, rows: ConditionRows, rows_per_step: int, *, seed: int, rank: int = 0, world: int = 1):
        """Start at step 0.

        Raises:
            DataError: rows that cannot be shared out evenly to the processes.
        """
        super().__init__(rows, rows.ids, rows_per_step, seed=seed, rank=rank, world=world)

    def next_step(self) -> Batch:
        """This rank's rows of the next step."""
        turns, places = np.divmod(self._mine() + self._step * self.rows_per_step, len(self.ranges))
        orders = {turn: np.random.default_rng((self.seed, int(turn))).permutation(len(self.ranges)) for turn in np.unique(turns)}
        self._step += 1
        return self.rows.batch([self._row(int(orders[turn][place]), int(turn)) for turn, place in zip(turns, places, strict=True)])
