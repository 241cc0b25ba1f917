"""Forward KL(teacher || student) over the whole vocabulary."""

from __future__ import annotations

from limbeck.objectives.dense import DenseDivergence
from limbeck.ops.fused import linear_kl


class ForwardKL(DenseDivergence):
    """Metrics ``kl`` and ``agreement``."""

    name = "kl"
    _operator = linear_kl
