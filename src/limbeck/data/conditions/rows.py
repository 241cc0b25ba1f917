"""Rows of conditions as batches: each row's text, whose it is, and what a generator reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from limbeck.data.conditions.texts import SIDES, random_keys
from limbeck.errors import DataError, did_you_mean
from limbeck.types import IGNORE, Batch

if TYPE_CHECKING:
    from limbeck.data.conditions.store import ConditionSet

ROUND = 64
"""Rows of windows are as long as a multiple of this, so that few lengths occur."""


class ConditionRows:
    """One side of some conditions as rows of ``sequence`` tokens.

    The examples of a condition stand one after the other; one that crosses the end of a row goes on in the next as a piece of
    its own, with positions from 0.  A condition begins a row, its last row is padded, and its rows follow each other.  Where
    examples are ``whole`` each is a row, and a batch is no longer than its longest needs.
    """

    def __init__(
        self,
        conditions: ConditionSet,
        ids: Sequence[int],
        side: str = "train",
        *,
        seed: int | None = None,
        draw: int = 0,
        condition_of: Mapping[int, int] | None = None,
    ):
        """See :meth:`limbeck.data.conditions.store.ConditionSet.rows`.

        Raises:
            DataError: no conditions, one twice or one that is not there, or no such side.
        """
        self.conditions, self.texts, self.side = conditions, conditions.texts, side
        self.ids = [int(i) for i in ids]
        if side not in SIDES:
            raise DataError(f"no side {side!r} of conditions{did_you_mean(side, SIDES) or ';'} sides: {', '.join(SIDES)}")
        readers = dict(condition_of or {})
        self._check(readers)
        self.sequence = conditions.manifest.sequence
        self._seed, self._draw = conditions.manifest.seed if seed is None else seed, draw
        self._ids_N = np.array(self.ids, dtype=np.int64)
        self._read_N = np.array([readers.get(i, i) for i in self.ids], dtype=np.int64)
        self._examples_E5, self._tokens = conditions.examples_E5, conditions.tokens

        # All examples of the set as one stream, in which no token is stored twice but those of mixes are counted again.
        lengths_E = self._examples_E5[:, 2] - self._examples_E5[:, 0]
        self._stream_E1 = np.concatenate([[0], np.cumsum(lengths_E)])
        at = SIDES.index(side)
        self._first_N2 = conditions.first_N3[self._ids_N][:, at : at + 2]
        begin_N, end_N = self._stream_E1[self._first_N2].T
        self._whole = conditions.manifest.whole
        rows_N = self._first_N2[:, 1] - self._first_N2[:, 0] if self._whole else -(-(end_N - begin_N) // self.sequence)
        self._first_row_N1 = np.concatenate([[0], np.cumsum(rows_N)])

    def _check(self, readers: dict[int, int]) -> None:
        if not self.ids:
            raise DataError("no conditions: name at least one by its id")
        for i in (*self.ids, *readers, *readers.values()):
            if not 0 <= i < len(self.conditions):
                raise DataError(f"no condition {i}: {self.conditions.folder} holds 0 to {len(self.conditions) - 1}")
        if len(set(self.ids)) < len(self.ids):
            twice = next(i for i in self.ids if self.ids.count(i) > 1)
            raise DataError(f"condition {twice} stands twice: rows of a condition are one range")

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._first_row_N1[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows."""
        return sum(self.conditions.conditions[i].tokens[self.side] for i in self.ids)

    def rows_of(self, condition: int) -> range:
        """The rows of one condition, by its id."""
        if condition not in self.ids:
            raise DataError(f"condition {condition} is not among the {len(self.ids)} of these rows")
        at = self.ids.index(condition)
        return range(int(self._first_row_N1[at]), int(self._first_row_N1[at + 1]))

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The rows with these numbers, on the CPU: int64 ``[B, T]``, ``adapters_B`` and ``condition_BSC``."""
        rows_B = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(rows_B) and (rows_B.min() < 0 or rows_B.max() >= len(self)):
            raise IndexError(f"rows {int(rows_B.min())} to {int(rows_B.max())} of {len(self)}")
        at_B = np.searchsorted(self._first_row_N1, rows_B, side="right") - 1
        local_B = rows_B - self._first_row_N1[at_B]
        start_B1, end_B1 = (bound[:, None] for bound in self._bounds(at_B, local_B))
        last_B1 = end_B1 - 1

        at_BT = start_B1 + np.arange(self._length(end_B1 - start_B1))
        real_BT = at_BT <= last_B1
        example_BT = np.searchsorted(self._stream_E1, np.minimum(at_BT, last_B1), side="right") - 1
        begins_BT = np.where(real_BT, np.maximum(self._stream_E1[example_BT], start_B1), last_B1 + 1)
        documents_BT = np.where(real_BT, example_BT - example_BT[:, :1], -1)
        token_BT = self._examples_E5[:, 0][example_BT] + np.where(real_BT, at_BT - self._stream_E1[example_BT], 0)
        ids_BT = np.where(real_BT, self._tokens[token_BT].astype(np.int64), self.conditions.manifest.pad)

        counts_BT = real_BT[:, 1:] & (documents_BT[:, 1:] == documents_BT[:, :-1])
        if self.conditions.manifest.loss == "answer":
            counts_BT &= token_BT[:, 1:] >= self._examples_E5[:, 1][example_BT[:, 1:]]
        elif self.conditions.mask is not None:
            counts_BT &= self.conditions.mask[token_BT[:, 1:]] != 0
        labels_BT = np.full_like(ids_BT, IGNORE)
        labels_BT[:, :-1] = np.where(counts_BT, ids_BT[:, 1:], IGNORE)
        own_B2 = np.stack([example_BT[:, 0], example_BT[:, -1] + 1], axis=1)
        ids, labels, positions, documents = map(_tensor, (ids_BT, labels_BT, at_BT - begins_BT, documents_BT))
        adapters, texts = _tensor(self._ids_N[at_B]), _tensor(self._read(at_B, local_B, own_B2))
        return Batch(ids, labels, positions, documents, adapters_B=adapters, condition_BSC=texts)

    def _bounds(self, at_B: np.ndarray, local_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where rows begin and end in the stream of all examples."""
        if self._whole:
            lines_B = self._first_N2[at_B, 0] + local_B
            return self._stream_E1[lines_B], self._stream_E1[lines_B + 1]
        start_B = self._stream_E1[self._first_N2[at_B, 0]] + local_B * self.sequence
        return start_B, np.minimum(start_B + self.sequence, self._stream_E1[self._first_N2[at_B, 1]])

    def _length(self, lengths: np.ndarray) -> int:
        """Tokens a row of a batch: windows differ, and what no row fills is not computed."""
        if not self._whole:
            return self.sequence
        longest = int(lengths.max(initial=1))
        return min(self.sequence, -(-longest // ROUND) * ROUND)

    def _read(self, at_B: np.ndarray, local_B: np.ndarray, own_B2: np.ndarray) -> np.ndarray:
        """Texts of the training side, int64 ``[B, S, C]``: the same for a row whatever other conditions are opened with it."""
        if self.texts.fixed_NSC is not None:
            return self.texts.fixed_NSC[self._read_N[at_B]].astype(np.int64)
        keys_B = random_keys(self._seed, self._draw, SIDES.index(self.side), self._ids_N[at_B], local_B)
        return self.texts.tokens(self.texts.draw(self._read_N[at_B], keys_B, own_B2))


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
