"""The rows of conditions in an order in which all conditions come up early."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from limbeck.data.conditions.rows import ConditionRows
from limbeck.types import Batch


class SpreadRows:
    """Row 0 of every condition, then row 1 of every condition that has one, and so on: the first rows are a sample of all."""

    def __init__(self, rows: ConditionRows):
        self.rows = rows
        self.sequence = rows.sequence
        ranges = [rows.rows_of(condition) for condition in rows.ids]
        places = [(turn, number, found.start + turn) for number, found in enumerate(ranges) for turn in range(len(found))]
        self._order = np.array([row for _, _, row in sorted(places)], dtype=np.int64)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._order)

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The rows with these places in the order, on the CPU."""
        return self.rows.batch(self._order[np.asarray(indices, dtype=np.int64).reshape(-1)])
