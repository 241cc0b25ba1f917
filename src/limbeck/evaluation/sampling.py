"""How tokens are drawn, for whoever asks: without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: greedy at ``temperature`` 0, else from the tempered distribution cut to its likeliest part.

    ``top_k`` ids (0: all), then of these the likeliest that together reach ``top_p``, then those of at least ``min_p`` times the
    likeliest's probability.  ``seed`` begins a generator of its own, on the CPU: drawing moves no global random state, and two
    models meet the same draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
