"""What a candidate is scored on: held-out text and recall probes, against one pass of the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.config.parts.stages import RecallOptions
from limbeck.data.dataset import TokenRows
from limbeck.errors import DataError
from limbeck.evaluation.evaluate import text_batches
from limbeck.evaluation.perplexity import CrossEntropyTally
from limbeck.evaluation.recall import TOKENS_A_FORWARD, probe_batch
from limbeck.models.head import head_of
from limbeck.models.packed import forward_packed
from limbeck.ops.fused import linear_kl
from limbeck.types import Batch, Head

TEXT = "text"


@dataclass(frozen=True)
class Score:
    """How far a model is from the teacher: KL in nats a token on text and at the answers of recall probes, top-1 agreement on
    text, and the share of answers that are right (by probe, and their mean)."""

    text: float
    agreement: float
    recall: float
    accuracy: float
    probes: dict[str, float]

    def mixed(self, recall_weight: float) -> float:
        """The number that ranks: lower is better."""
        return (1 - recall_weight) * self.text + recall_weight * self.recall

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary; :meth:`from_json` gives the same numbers back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Score:
        """From a ledger's line."""
        return cls(**value)


@dataclass(frozen=True)
class _Piece:
    """One batch with the teacher's final hidden states at the positions that count, ``[N, D]``."""

    part: str
    batch: Batch
    teacher_ND: Tensor


class ScoreTally:
    """Sums of one candidate over the pieces."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}
        self._answers: dict[str, CrossEntropyTally] = {}

    def add(self, piece: _Piece, hidden_BTD: Tensor, head: Head, teacher_head: Head) -> None:
        """Compare a candidate's final hidden states of a piece with the teacher's; the heads see counted positions only."""
        labels_BT = piece.batch.labels_BT
        counts_BT = piece.batch.label_mask_BT
        hidden_ND = hidden_BTD[counts_BT]
        everywhere_N = torch.ones(len(hidden_ND), dtype=torch.bool, device=hidden_ND.device)
        kl, metrics = linear_kl(hidden_ND, head, piece.teacher_ND.to(hidden_ND), teacher_head, everywhere_N)
        sums = self._sums.setdefault(piece.part, [0.0, 0.0, 0.0])
        for i, value in enumerate((kl, metrics.agreement, metrics.count)):
            sums[i] += float(value)
        if piece.part != TEXT:
            self._answers.setdefault(piece.part, CrossEntropyTally()).add(hidden_ND[None], head, labels_BT[counts_BT][None])

    def result(self) -> Score:
        """Means over tokens within a part, over probes between them."""
        mean = {part: kl / max(count, 1) for part, (kl, _, count) in self._sums.items()}
        right = {part: tally.result()["accuracy"] for part, tally in self._answers.items()}
        _, agreed, count = self._sums[TEXT]
        recall = [mean[part] for part in right]
        return Score(mean[TEXT], agreed / max(count, 1), sum(recall) / len(recall), sum(right.values()) / len(right), right)


class Scoring:
    """The pieces, with the teacher's answers; every candidate meets the same ones.

    ``num_tokens`` is what one pass over all of them costs.
    """

    def __init__(self, pieces: Sequence[_Piece], teacher_head: Head, compute: AbstractContextManager):
        self.pieces = list(pieces)
        self.teacher_head = teacher_head
        self.compute = compute
        self.num_tokens = sum(piece.batch.num_tokens for piece in self.pieces)

    def __iter__(self) -> Iterator[_Piece]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    @torch.no_grad()
    def score(self, model: Any) -> Score:
        """One pass of a whole model, in evaluation mode."""
        tally, training = ScoreTally(), model.training
        model.eval()
        with self.compute:
            for piece in self.pieces:
                tally.add(piece, forward_packed(model, piece.batch), head_of(model), self.teacher_head)
        model.train(training)
        return tally.result()


class _HalfRows:
    """Every second held-out row: those that rank, or those that compare sets."""

    def __init__(self, rows: TokenRows, half: int):
        self._rows, self._half = rows, half
        self.sequence = rows.sequence

    def __len__(self) -> int:
        return max(0, (len(self._rows) - self._half + 1) // 2)

    def batch(self, indices: Sequence[int]) -> Batch:
        return self._rows.batch([2 * index + self._half for index in indices])


@torch.no_grad()
def make_scoring(
    teacher: Any,
    rows: TokenRows,
    ids: np.ndarray,
    *,
    num_rows: int,
    recall: RecallOptions,
    half: int,
    seed: int,
    compute: AbstractContextManager | None = None,
) -> Scoring:
    """Run the teacher once over one half of the held-out data: ``half`` 0 ranks, 1 compares sets.

    ``ids`` are the tokenizer's ordinary ids.  Text is held-out text without made-up documents; recall has probes of its own, from
    another seed in each half.

    Raises:
        DataError: too few held-out rows for two halves.
    """
    side: Any = _HalfRows(rows, half)
    if not len(side):
        raise DataError(
            f"{len(rows)} held-out rows are too few to rank layers on one half and to compare sets on the other: raise data.held_out"
        )
    compute = compute or nullcontext()
    parts = [(TEXT, batch) for batch in text_batches(side, num_rows)]
    ids = ids[: recall.vocabulary]
    for task in recall.tasks:
        for distance in recall.distances:
            batch = probe_batch(task, distance, recall.rows, ids, seed=2 * seed + half)
            size = max(1, TOKENS_A_FORWARD // batch.input_ids_BT.shape[1])
            parts += [(f"{task}/{distance}", piece) for piece in batch.split(size)]
    pieces = []
    with compute:
        for part, batch in parts:
            batch = replace(batch, domains_BT=None).to(teacher.device)
            pieces.append(_Piece(part, batch, forward_packed(teacher, batch)[batch.label_mask_BT]))
    if not any(len(piece.teacher_ND) for piece in pieces if piece.part == TEXT):
        raise DataError("no position of the held-out rows has a label to predict: are the documents one token long?")
    return Scoring(pieces, head_of(teacher), compute)


