"""A conversation longer than a row -> windows of whole turns, each with the system's and the user's words at its beginning.

A *step* is an assistant turn and what answers it.  A window is the conversation's beginning and steps that follow each other; it may
end behind the words of an assistant whose answer has no room.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from limbeck.data.trajectories.tokens import Tokens

Policy = Literal["drop", "head", "head_tail", "windows"]


@dataclass(frozen=True)
class Window:
    """Slices of one conversation: ``[first, behind the last)`` tokens, and from which token on the assistant's words count."""

    slices: tuple[tuple[int, int], ...]
    counts_from: int

    def ids(self, tokens: Tokens) -> np.ndarray:
        """Token ids, int64 ``[W]``."""
        return np.concatenate([tokens.ids_T[a:b] for a, b in self.slices])

    def targets(self, tokens: Tokens) -> np.ndarray:
        """Which of them are targets, bool ``[W]``."""
        return np.concatenate([tokens.spoken_T[a:b] & (np.arange(a, b) >= self.counts_from) for a, b in self.slices])


def cut(tokens: Tokens, size: int, policy: Policy, overlap: float) -> tuple[list[Window], int]:
    """Windows of at most ``size`` tokens, and how many assistant turns are a target in none of them.

    ``drop``: the whole or nothing; ``head``: the first steps; ``head_tail``: as many tokens of the first steps as of the last;
    ``windows``: all, each window after the first beginning with earlier steps of at most the share ``overlap`` of its room, which
    do not count again.
    """
    count = len(tokens.turns_N3)
    if len(tokens) <= size:
        return [Window(((0, len(tokens)),), 0)], 0
    prefix = int(tokens.turns_N3[0, 0])
    room = size - prefix
    steps = _Steps(tokens)
    if policy == "drop" or room <= 0:
        return [], count
    if policy == "head":
        window = steps.window(prefix, 0, room)
        return ([window[0]], count - window[1]) if window is not None else ([], count)
    if policy == "head_tail":
        return _head_and_tail(steps, prefix, room, count)
    found: list[Window] = []
    counted = at = 0
    while at < count:
        window = steps.window(prefix, at, room, before=overlap if found else 0.0)
        if window is None:
            # An assistant turn that is longer than a row: no window can hold it.
            at += 1
            continue
        found.append(window[0])
        counted += window[1]
        at += window[1]
    return found, count - counted


def _head_and_tail(steps: _Steps, prefix: int, room: int, count: int) -> tuple[list[Window], int]:
    head = steps.whole(0, room // 2)
    first = steps.begins[head]
    tail = count
    while tail > head and steps.ends - steps.begins[tail - 1] <= room - (first - steps.begins[0]):
        tail -= 1
    slices = ((0, first), (steps.begins[tail], steps.ends)) if tail < count else ((0, first),)
    kept = head + count - tail
    return ([Window(slices, 0)], count - kept) if kept else ([], count)


class _Steps:
    """Where the steps of a conversation begin, and how many fit."""

    def __init__(self, tokens: Tokens):
        self.ends = len(tokens)
        self.count = len(tokens.turns_N3)
        self.begins = [*tokens.turns_N3[:, 0].tolist(), self.ends]
        self.spoken_ends = tokens.turns_N3[:, 2].tolist()

    def whole(self, at: int, room: int) -> int:
        """The first step from ``at`` on that is no longer whole within ``room`` tokens."""
        return int(np.searchsorted(self.begins, self.begins[at] + room, side="right")) - 1

    def window(self, prefix: int, at: int, room: int, before: float = 0.0) -> tuple[Window, int] | None:
        """A window whose first target is step ``at``, and how many steps count in it; None if not even its words fit."""
        if self.spoken_ends[at] - self.begins[at] > room:
            return None
        # Earlier steps make way for the first that counts.
        spare = min(int(before * room), room - (self.spoken_ends[at] - self.begins[at]))
        first = at
        while first > 0 and self.begins[at] - self.begins[first - 1] <= spare:
            first -= 1
        behind = self.whole(first, room)
        end = self.begins[behind]
        if behind < self.count and self.spoken_ends[behind] - self.begins[first] <= room:
            end, behind = self.spoken_ends[behind], behind + 1
        return Window(((0, prefix), (self.begins[first], end)), self.begins[at]), behind - at
