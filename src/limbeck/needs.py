"""What an objective needs from a teacher or a student, as small frozen values.

Light on purpose (no torch): options classes declare their needs and what they provide, so that ``limbeck check`` reports every
gap at once, before a weight is loaded.  Needs of one class merge; a third party can add a class of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """Base class.  Two needs of one class merge into the one that answers both."""

    def merge(self, other: Need) -> Need:
        """The need that covers ``self`` and ``other``; the default holds for needs without parameters."""
        if self != other:
            raise TypeError(f"{type(self).__name__} has parameters and must define merge()")
        return self


@dataclass(frozen=True)
class HeadHidden(Need):
    """Final hidden states ``[B, T, D]`` and the output ``Head``: what the fused divergences start from."""


@dataclass(frozen=True)
class AttentionStream(Need):
    """Every attention layer's input and output, one layer at a time, inside ``teacher.stream``."""


@dataclass(frozen=True)
class Hidden(Need):
    """Hidden states after the named decoder layers, ``[B, T, D]`` each."""

    layers: tuple[int, ...]

    def merge(self, other: Need) -> Need:
        if not isinstance(other, Hidden):
            raise TypeError("needs of different classes do not merge")
        return Hidden(tuple(sorted({*self.layers, *other.layers})))


def merge_needs(needs: Iterable[Need]) -> dict[type[Need], Need]:
    """One need a class, in the order first seen."""
    merged: dict[type[Need], Need] = {}
    for need in needs:
        held = merged.get(type(need))
        merged[type(need)] = need if held is None else held.merge(need)
    return merged
