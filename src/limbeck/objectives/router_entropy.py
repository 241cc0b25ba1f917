"""How undecided the routers are."""

from __future__ import annotations

import math

from torch import Tensor

from limbeck.objectives.routing import RouterObjective


class RouterEntropy(RouterObjective):
    """``H(p) / log E`` of each token: 1 where a router is uniform, 0 where it is sure."""

    name = "router_entropy"

    def term(self, logits_LBTE: Tensor) -> Tensor:
        """The share of the uniform entropy, ``[L, B, T]``."""
        logp = logits_LBTE.log_softmax(-1)
        return -(logp.exp() * logp).sum(-1) / math.log(max(logits_LBTE.shape[-1], 2))
