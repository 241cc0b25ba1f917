"""The z-loss of routers (ST-MoE, Zoph et al., arXiv 2202.08906)."""

from __future__ import annotations

from torch import Tensor

from limbeck.objectives.routing import RouterObjective


class RouterZ(RouterObjective):
    """``logsumexp(logits)^2`` of each token."""

    name = "router_z"

    def term(self, logits_LBTE: Tensor) -> Tensor:
        """The squared logarithm of the partition sum, ``[L, B, T]``."""
        return logits_LBTE.logsumexp(-1).square()
