"""Reverse KL(student || teacher) over the whole vocabulary."""

from __future__ import annotations

from limbeck.objectives.dense import DenseDivergence
from limbeck.ops.divergences import linear_reverse_kl


class ReverseKL(DenseDivergence):
    """Metrics ``reverse_kl`` and ``agreement``."""

    name = "reverse_kl"
    _operator = linear_reverse_kl
