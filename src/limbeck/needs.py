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
class TopK(Need):
    """The teacher's ``k`` likeliest ids with their raw logits and, for each temperature, the logarithm of the whole partition sum.

    With logZ_T the tempered probabilities of the kept ids, and so the mass of the rest, are exact at every temperature asked
    for.  ``samples`` more ids are drawn from the tail (from the whole distribution if ``k`` is 0) at the first temperature.
    ``exact=False`` accepts a teacher that has logZ at T = 1 only.
    """

    k: int
    temperatures: tuple[float, ...] = (1.0,)
    samples: int = 0
    exact: bool = True

    def merge(self, other: Need) -> Need:
        if not isinstance(other, TopK):
            raise TypeError("needs of different classes do not merge")
        if self.samples and other.samples and (self.k, self.temperatures[0]) != (other.k, other.temperatures[0]):
            raise ValueError("two objectives that sample the teacher's tail must agree on k and temperature")
        first = self if self.samples or not other.samples else other
        if first.samples and max(self.k, other.k) != first.k:
            raise ValueError(f"an objective samples what the {first.k} likeliest ids leave, and another wants {max(self.k, other.k)} kept")
        temperatures = tuple(dict.fromkeys((*first.temperatures, *self.temperatures, *other.temperatures)))
        return TopK(max(self.k, other.k), temperatures, max(self.samples, other.samples), self.exact or other.exact)


@dataclass(frozen=True)
class AttentionStream(Need):
    """Every attention layer's input and output, one layer at a time, inside ``teacher.stream``."""


@dataclass(frozen=True)
class AttentionQKV(Need):
    """Queries, keys and values of the named decoder layers as their projections give them (negative numbers count from the end)."""

    layers: tuple[int, ...]

    def merge(self, other: Need) -> Need:
        if not isinstance(other, AttentionQKV):
            raise TypeError("needs of different classes do not merge")
        return AttentionQKV(tuple(dict.fromkeys((*self.layers, *other.layers))))


@dataclass(frozen=True)
class RouterLogits(Need):
    """What every router of a mixture of experts gave each token: its logits, and the experts that it chose."""


@dataclass(frozen=True)
class AdapterFactors(Need):
    """The teacher LoRA of every row's condition: A and B."""


@dataclass(frozen=True)
class InputMoments(Need):
    """``E[x x^T]`` of the inputs of every Linear that adapters change, on the probes."""


@dataclass(frozen=True)
class Deltas(Need):
    """How the teacher adapter of every row's condition moves the base's hidden states on probes, and the probes."""


def merge_needs(needs: Iterable[Need]) -> dict[type[Need], Need]:
    """One need a class, in the order first seen."""
    merged: dict[type[Need], Need] = {}
    for need in needs:
        held = merged.get(type(need))
        merged[type(need)] = need if held is None else held.merge(need)
    return merged
