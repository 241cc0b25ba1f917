"""Paired comparisons with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean and the middle 95% of its resampled values."""

    mean: float
    low: float
    high: float


def paired(differences: Sequence[float] | np.ndarray, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean of paired differences, resampled over their first axis (conditions); ``[N]`` or ``[N, seeds]``.

    With seeds, both axes are resampled, so that the interval covers another draw of the tasks and of the random numbers.
    """
    table = np.asarray(differences, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, table.shape[0], (resamples, table.shape[0]))
    columns = generator.integers(0, table.shape[1], (resamples, table.shape[1]))
    means = np.array([table[np.ix_(r, c)].mean() for r, c in zip(rows, columns, strict=True)])
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(table.mean()), float(low), float(high))


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank.  Not a number for fewer than three points or a constant."""
    if len(x) < 3:
        return float("nan")
    a, b = _ranks(np.asarray(x, dtype=np.float64)), _ranks(np.asarray(y, dtype=np.float64))
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse]
