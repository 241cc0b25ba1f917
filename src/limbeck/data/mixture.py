"""How much of each source, in which order, and where in the rows: plans in numbers, no text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from limbeck.errors import DataError

MAX_WAITING = 64
"""Whole documents that may wait for the start of a row."""


def targets(available: Sequence[int | None], shares: Sequence[float | None], limit: int | None) -> list[int]:
    """Tokens to take from each source.

    Sources without a share are taken whole (cut alike where ``limit``, the most tokens altogether, asks for it); one with a share fills
    that part of the total.  Where all have shares, the total is the largest that repeats none of them.  ``available`` is None for a
    source that makes documents up.

    Raises:
        DataError: shares that leave nothing for the sources without one, or do not add up to 1.
    """
    shared = sum(share for share in shares if share is not None)
    free = [i for i, share in enumerate(shares) if share is None]
    words = ", ".join("whole" if share is None else f"{share:g}" for share in shares)
    if free:
        if shared >= 1:
            raise DataError(f"source.share: shares add up to {shared:g} and leave nothing for the sources without one ({words})")
        endless = any(available[i] is None for i in free)
        if endless and limit is None:
            raise DataError("source.share: made-up documents have no end: give their source a `share`, or set `max_tokens`")
        budget = None if limit is None else limit * (1 - shared)
        whole = budget if endless else sum(available[i] or 0 for i in free)
        assert whole is not None
        taken = whole if budget is None else min(whole, budget)
        total = taken / (1 - shared)
        known = sum(available[i] or 0 for i in free)
        unmade = [i for i in free if available[i] is None]

        def free_target(i: int) -> float:
            if available[i] is None:
                return max(0.0, taken - known) / len(unmade)
            return (available[i] or 0) * min(1.0, taken / known)

        return [round(free_target(i) if share is None else total * share) for i, share in enumerate(shares)]
    if abs(shared - 1) > 1e-6:
        raise DataError(
            f"source.share: every source has a share and they add up to {shared:g} ({words}): make them add up to 1, or leave out the "
            "share of the source that is to be taken whole"
        )
    bounds = [count / share for count, share in zip(available, shares, strict=True) if count is not None and share]
    if limit is not None:
        bounds.append(limit)
    if not bounds:
        raise DataError("source.share: made-up documents have no end: set `max_tokens`")
    return [round(min(bounds) * (share or 0)) for share in shares]


def draw(lengths: np.ndarray, target: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Documents in random order whose lengths add up to ``target`` tokens: every one once before any comes again.

    Returns:
        indices and lengths, the last one cut to meet the target.
    """
    total = int(lengths.sum())
    if total == 0 or target == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    passes = -(-target // total)
    order = np.concatenate([rng.permutation(len(lengths)) for _ in range(passes)])
    ends = np.cumsum(lengths[order])
    count = int(np.searchsorted(ends, target)) + 1
    order, taken = order[:count], lengths[order[:count]].copy()
    taken[-1] -= int(ends[count - 1]) - target
    return order, taken


class Entry(NamedTuple):
    """A document of the mixture: the store that holds it, its number there, its length, and whether it must not be cut."""

    store: int
    document: int
    length: int
    whole: bool


class Piece(NamedTuple):
    """Tokens ``start … stop`` of a document."""

    entry: Entry
    start: int
    stop: int


def pack(entries: Iterable[Entry], sequence: int) -> Iterator[Piece]:
    """Documents one after the other in rows of ``sequence`` tokens; those marked whole never cross the end of a row.

    A whole document that does not fit waits for the next row, at whose start the text that runs over is interrupted.  Where there is no
    text to fill the row, it is cut.
    """
    filled = 0
    waiting: deque[Entry] = deque()

    def emit(entry: Entry, start: int, stop: int) -> Piece:
        nonlocal filled
        filled = (filled + stop - start) % sequence
        return Piece(entry, start, stop)

    def fitting() -> Iterator[Piece]:
        for _ in range(len(waiting)):
            entry = waiting.popleft()
            if entry.length <= sequence - filled:
                yield emit(entry, 0, entry.length)
            else:
                waiting.append(entry)

    def force() -> Iterator[Piece]:
        yield from fitting()
        if waiting:
            entry = waiting.popleft()
            yield emit(entry, 0, min(entry.length, sequence - filled))

    for entry in entries:
        if entry.whole:
            if entry.length <= sequence - filled:
                yield emit(entry, 0, entry.length)
            else:
                waiting.append(entry)
            while len(waiting) > MAX_WAITING:
                yield from force()
            continue
        start = 0
        while waiting and entry.length - start > sequence - filled:
            if filled:
                piece = emit(entry, start, start + sequence - filled)
                start = piece.stop
                yield piece
            yield from fitting()
        yield emit(entry, start, entry.length)
    while waiting:
        yield from force()
