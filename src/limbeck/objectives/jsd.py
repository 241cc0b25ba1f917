"""Generalised Jensen-Shannon divergence over the whole vocabulary."""

from __future__ import annotations

from limbeck.config.parts.objectives import JSDOptions
from limbeck.objectives.dense import DenseDivergence
from limbeck.ops.divergences import linear_jsd


class JSD(DenseDivergence):
    """Metrics ``jsd`` and ``agreement``."""

    name = "jsd"
    _operator = linear_jsd

    def __init__(self, options: JSDOptions):
        super().__init__(options, beta=options.beta)
