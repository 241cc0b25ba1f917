"""How much of each source, and where its documents go in the rows: plans in numbers, no text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from limbeck.errors import DataError

MAX_WAITING = 64
"""Whole documents that may wait for the start of a row."""


def targets(available: Sequence[int | None], shares: Sequence[float | None], limit: int | None) -> list[int]:
    """Tokens to take from each source; ``available`` is None for one that makes documents up.

    Sources without a share are taken whole (all cut alike where ``limit``, the most tokens altogether, asks for it); one with a
    share fills that part of the total.  Where all have shares, the total is the largest that repeats none of them.

    Raises:
        DataError: shares that leave nothing for the sources without one, or do not add up to 1.
    """
    shared = sum(share for share in shares if share is not None)
    words = ", ".join("whole" if share is None else f"{share:g}" for share in shares)
    if None not in shares:
        return _all_shared(available, [share or 0.0 for share in shares], limit, words)
    if shared >= 1:
        raise DataError(f"source.share: shares add up to {shared:g} and leave nothing for the sources without one ({words})")
    free = [count for count, share in zip(available, shares, strict=True) if share is None]
    known, num_endless = sum(count or 0 for count in free), free.count(None)
    budget = None if limit is None else limit * (1 - shared)
    if num_endless and budget is None:
        raise DataError("source.share: made-up documents have no end: give their source a `share`, or set `max_tokens`")
    taken = float(known) if budget is None else budget if num_endless else min(known, budget)

    def target(count: int | None, share: float | None) -> float:
        if share is not None:
            return share * taken / (1 - shared)
        if count is None:
            return max(0.0, taken - known) / num_endless
        return count * min(1.0, taken / known) if known else 0.0

    return [round(target(count, share)) for count, share in zip(available, shares, strict=True)]


def _all_shared(available: Sequence[int | None], shares: Sequence[float], limit: int | None, words: str) -> list[int]:
    if abs(sum(shares) - 1) > 1e-6:
        raise DataError(
            f"source.share: every source has a share and they add up to {sum(shares):g} ({words}): make them add up to 1, or "
            "leave out the share of the source that is to be taken whole"
        )
    totals = [count / share for count, share in zip(available, shares, strict=True) if count]
    if limit is not None:
        totals.append(limit)
    if not totals:
        raise DataError("source.share: made-up documents have no end: set `max_tokens`")
    return [round(min(totals) * share) for share in shares]


def draw(lengths: np.ndarray, target: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Documents in random order whose lengths add up to ``target`` tokens: every one once before any comes again.

    Returns:
        numbers and lengths of the documents, the last one cut to meet the target.
    """
    total = int(lengths.sum())
    if not total or not target:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    order = np.concatenate([rng.permutation(len(lengths)) for _ in range(-(-target // total))])
    ends = np.cumsum(lengths[order])
    count = int(np.searchsorted(ends, target)) + 1
    order, taken = order[:count], lengths[order[:count]].copy()
    taken[-1] -= int(ends[count - 1]) - target
    return order, taken


class Entry(NamedTuple):
    """A document of the mixture: its source, its number there, its length, and whether it must not be cut."""

    source: int
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

    A recall document that is cut loses what it asks for.  One that does not fit waits for the next row, at whose start the text
    that runs over is interrupted; where there is no text to fill the row, it is cut after all.
    """
    filled = 0
    waiting: deque[Entry] = deque()

    def place(entry: Entry, start: int, stop: int) -> Piece:
        nonlocal filled
        filled = (filled + stop - start) % sequence
        return Piece(entry, start, stop)

    def fitting() -> Iterator[Piece]:
        for _ in range(len(waiting)):
            entry = waiting.popleft()
            if entry.length <= sequence - filled:
                yield place(entry, 0, entry.length)
            else:
                waiting.append(entry)

    def forced() -> Iterator[Piece]:
        yield from fitting()
        if waiting:
            shortest = min(waiting, key=lambda entry: entry.length)
            waiting.remove(shortest)
            yield place(shortest, 0, min(shortest.length, sequence - filled))

    for entry in entries:
        if entry.whole and entry.length <= sequence:
            if entry.length <= sequence - filled:
                yield place(entry, 0, entry.length)
            else:
                waiting.append(entry)
            while len(waiting) > MAX_WAITING:
                yield from forced()
            continue
        start = 0
        while waiting and entry.length - start > sequence - filled:
            if filled:
                piece = place(entry, start, start + sequence - filled)
                start = piece.stop
                yield piece
            yield from fitting()
        yield place(entry, start, entry.length)
    while waiting:
        yield from forced()
