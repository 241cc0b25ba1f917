"""Lion (Chen et al., arXiv 2302.06675): every number moves by the learning rate, in the direction of an interpolated momentum's sign."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from limbeck.engine.shards import local

BETAS = (0.9, 0.99)
"""Lion's own."""


class Lion(torch.optim.Optimizer):
    """``u = sign(b1 m + (1 - b1) g);  p <- (1 - lr decay) p - lr u;  m <- b2 m + (1 - b2) g``.

    Groups have ``lr``, ``weight_decay`` (decoupled) and ``betas``.  Every number is on its own, so shards need not meet.
    """

    def __init__(self, params: Any, *, lr: float = 1e-4, betas: tuple[float, float] = BETAS, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            for p in members:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            if not members:
                continue
            first, second = group["betas"]
            weights: list[Tensor] = [local(p) for p in members]
            grads: list[Tensor] = [local(p.grad) for p in members]
            momenta: list[Tensor] = [local(self.state[p]["exp_avg"]) for p in members]
            updates = torch._foreach_lerp(momenta, grads, 1 - first)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, updates, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, grads, 1 - second)
