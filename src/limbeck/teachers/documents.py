"""Between packed rows and the documents in them: what is asked of a teacher elsewhere, and how its answers come back.

A teacher that is served or stored knows documents, not our packing.  This is the one place where a position of a packed row
becomes a position of a document and back; protocols and stores deal in :class:`Ask` and :class:`TopKRows` alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from limbeck.needs import TopK
from limbeck.types import IGNORE, Batch, Signal, TopKSignal

THREADS = 4
"""Micro-batches whose answers are read, or asked of one teacher, at one time."""


@dataclass(frozen=True)
class Ask:
    """One document (a piece of a packed row, whose context begins at its own first token).

    ``ids`` int32 ``[n]``; ``positions`` int32 ``[m]``, ascending: the teacher's distribution over the token **after** each of
    them is wanted, so the last position of a document is never among them.
    """

    ids: np.ndarray
    positions: np.ndarray
    domain: int = 0

    @cached_property
    def key(self) -> bytes:
        """16 bytes that name the document by its tokens, whatever is asked about it."""
        return hashlib.blake2b(np.ascontiguousarray(self.ids, "<i4").tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class TopKRows:
    """The answer to an :class:`Ask`, row ``j`` for ``positions[j]``.

    ``ids_mK`` int32, likeliest first; ``logits_mK`` float32; ``log_z_mZ`` float32, one column a temperature asked for;
    ``samples_mS`` int32 or None (:class:`~limbeck.types.TopKSignal`).
    """

    ids_mK: np.ndarray
    logits_mK: np.ndarray
    log_z_mZ: np.ndarray
    samples_mS: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids_mK)


def asks_of(batch: Batch) -> tuple[list[Ask], list[int]]:
    """The documents of a batch of which any position counts, in order, and the index of each one's first token in ``[B * T]``."""
    ids_BT, documents_BT, mask_BT = (part.cpu().numpy() for part in (batch.input_ids_BT, batch.documents_BT, batch.label_mask_BT))
    domains_BT = None if batch.domains_BT is None else batch.domains_BT.cpu().numpy()
    asks, starts = [], []
    width = ids_BT.shape[1]
    for row in range(len(ids_BT)):
        edges = np.flatnonzero(np.diff(documents_BT[row], prepend=-2, append=-2))
        for start, end in pairwise(edges):
            positions = np.flatnonzero(mask_BT[row, start:end])
            if documents_BT[row, start] < 0 or not len(positions):
                continue
            domain = 0 if domains_BT is None else int(domains_BT[row, start])
            asks.append(Ask(ids_BT[row, start:end].astype(np.int32), positions.astype(np.int32), domain))
            starts.append(row * width + int(start))
    return asks, starts


def assemble(
    batch: Batch,
    asks: Sequence[Ask],
    starts: Sequence[int],
    answers: Sequence[TopKRows | None],
    temperatures: tuple[float, ...],
    *,
    missing: str = "ce_only",
) -> tuple[Batch, TopKSignal]:
    """The signal of a batch from the answers to its documents, and the batch with what was not answered masked.

    ``missing`` says what becomes of positions without an answer: ``ce_only`` leaves them to losses that need no teacher,
    ``skip`` takes them out of every loss.  Shapes are those of :class:`~limbeck.types.TopKSignal`; all answers have one K.  Both are on
    the device of the batch.
    """
    rows = [start + ask.positions.astype(np.int64) for ask, start in zip(asks, starts, strict=True)]
    there = [i for i, answer in enumerate(answers) if answer is not None]
    given = [answer for answer in answers if answer is not None]
    for i in there:
        answer = answers[i]
        assert answer is not None
        if len(answer) != len(asks[i].positions):
            raise ValueError(f"an answer of {len(answer)} rows to a question about {len(asks[i].positions)} positions")

    def joined(parts: list[np.ndarray], empty: tuple[int, ...], dtype: type) -> torch.Tensor:
        whole = np.concatenate(parts) if parts else np.zeros(empty)
        return torch.from_numpy(np.ascontiguousarray(whole, dtype=dtype))

    signal = TopKSignal(
        rows_n=joined([rows[i] for i in there], (0,), np.int64),
        ids_nK=joined([answer.ids_mK for answer in given], (0, 0), np.int64),
        logits_nK=joined([answer.logits_mK for answer in given], (0, 0), np.float32),
        log_z_nZ=joined([answer.log_z_mZ for answer in given], (0, len(temperatures)), np.float32),
        temperatures=temperatures,
        samples_nS=None
        if not given or given[0].samples_mS is None
        else joined([answer.samples_mS for answer in given if answer.samples_mS is not None], (0, 0), np.int64),
    ).to(batch.labels_BT.device)
    if len(there) == len(asks):
        return batch, signal
    answered_BT = torch.zeros_like(batch.labels_BT, dtype=torch.bool)
    answered_BT.view(-1)[signal.rows_n] = True
    if missing == "skip":
        return replace(batch, labels_BT=batch.labels_BT.masked_fill(~answered_BT, IGNORE), answered_BT=answered_BT), signal
    return replace(batch, answered_BT=answered_BT), signal


class PendingAnswers:
    """The answers to a micro-batch's documents on their way (:class:`~limbeck.types.Pending`), whoever gives them.

    ``wait(timeout)`` gives them or raises :class:`TimeoutError`; ``finish`` puts them together, as :func:`assemble` does.
    """

    def __init__(
        self,
        wait: Callable[[float | None], Sequence[TopKRows | None]],
        finish: Callable[[Sequence[TopKRows | None]], tuple[Batch, TopKSignal]],
    ):
        self._wait, self._finish = wait, finish

    def result(self, timeout: float | None = None) -> tuple[Batch, Signal]:
        """Batch and signal.  Raises :class:`~limbeck.errors.TeacherError`, and ``TimeoutError`` after ``timeout`` seconds."""
        batch, rows = self._finish(self._wait(timeout))
        return batch, Signal({TopK: rows})
