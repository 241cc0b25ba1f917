"""The maths of choosing layers: controls, orders, rank correlation, and who stops early.  No tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

HALO_EPS = 1e-6
"""Of the ratio in arXiv 2601.22156, equation 8."""


def uniform_set(num_layers: int, keep: int) -> list[int]:
    """``keep`` layers evenly spaced, each the last of its share: ``[3, 7, 11 ...]`` for a quarter."""
    return [(number + 1) * num_layers // keep - 1 for number in range(keep)]


def random_sets(num_layers: int, keep: int, count: int, seed: int) -> list[list[int]]:
    """``count`` sets drawn without repetition; all of them if there are fewer."""
    count = min(count, math.comb(num_layers, keep))
    rng, found = np.random.default_rng((seed, num_layers, keep)), dict[tuple[int, ...], None]()
    while len(found) < count:
        found[tuple(sorted(rng.choice(num_layers, keep, replace=False).tolist()))] = None
    return [list(layers) for layers in found]


def by_importance(importance: Mapping[int, float]) -> list[int]:
    """Layers from the one to keep first; equal ones in their order in the model."""
    return sorted(importance, key=lambda layer: (-importance[layer], layer))


def halo_importance(recall: float, text: float) -> float:
    """HALO's score of a layer: what recall loses over what text loses when it is replaced (arXiv 2601.22156, equation 8)."""
    return max(recall, 0.0) / (max(text, 0.0) + HALO_EPS)


def spearman(one: Sequence[int], other: Sequence[int]) -> float:
    """Rank correlation of two orders of the same layers, -1 to 1; 1 for a single layer."""
    if sorted(one) != sorted(other):
        raise ValueError(f"orders of different layers: {list(one)} and {list(other)}")
    n = len(one)
    if n < 2:
        return 1.0
    place = {layer: rank for rank, layer in enumerate(other)}
    return 1 - 6 * sum((rank - place[layer]) ** 2 for rank, layer in enumerate(one)) / (n * (n * n - 1))


def stops_after(scores: Sequence[float], earlier: Sequence[Sequence[float]], *, keep: int, rungs: int, margin: float | None) -> int:
    """After how many of its scores a candidate ends; ``rungs`` for one that finishes.

    ``scores[r]`` is its held-out score (lower is better) after part ``r``, ``earlier`` those of the candidates before it, each as
    far as that one ran.  It ends when ``keep`` of them were better at the same point by more than ``margin`` of theirs: then it
    is not among the first ``keep`` unless the order turns.
    """
    for rung, score in enumerate(scores[: rungs - 1]):
        rivals = sorted(trace[rung] for trace in earlier if len(trace) > rung)
        if margin is not None and len(rivals) >= keep and score > (1 + margin) * rivals[keep - 1]:
            return rung + 1
    return rungs


def race(traces: Mapping[int, Sequence[float]], *, keep: int, rungs: int, margin: float | None) -> dict[int, list[float]]:
    """Each candidate's scores as far as it would have run, the mapping's order being that of the candidates.

    A pure function of the traces: candidates that ran at the same time, or elsewhere to the end, count as if they had run one
    after the other.
    """
    ran: dict[int, list[float]] = {}
    for layer, scores in traces.items():
        ran[layer] = list(scores[: stops_after(scores, list(ran.values()), keep=keep, rungs=rungs, margin=margin)])
    return ran


def race_order(ran: Mapping[int, Sequence[float]], rest: Sequence[int] = ()) -> list[int]:
    """Candidates that ran longer first, by their last score; then ``rest``, which never ran, as they come."""
    return [*sorted(ran, key=lambda layer: (-len(ran[layer]), ran[layer][-1], layer)), *(layer for layer in rest if layer not in ran)]
