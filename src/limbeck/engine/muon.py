"""Muon (Jordan et al.): the momentum of a matrix, made orthogonal, is the update; stacked experts are matrices of their own.

Nothing of it may be taken over a stack or a part of a matrix: a stack flattened to one matrix, gate and up halves in one, or a rank's
shard of a matrix each have another orthogonal factor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from limbeck.engine.shards import gathered, holds_whole_matrices, like_shard, local
from limbeck.ops.newton_schulz import STEPS, orthogonalise


def halves_of(name: str) -> int:
    """How many matrices stand above each other in the parameter of this name: 2 in a fused ``gate_up_proj``."""
    return 2 if name.removesuffix(".weight").rpartition(".")[2] == "gate_up_proj" else 1


def is_matrix(parameter: Tensor) -> bool:
    """Whether a ``parameter`` of any shape holds matrices ``[..., O, I]``; a short convolution's ``[C, 1, W]`` holds vectors."""
    return parameter.ndim >= 2 and min(parameter.shape[-2:]) > 1


class Muon(torch.optim.Optimizer):
    """``m <- b m + (1 - b) g;  u = g + b (m - g)`` with Nesterov, else ``m``;  ``p <- (1 - lr decay) p - lr s(O, I) NewtonSchulz(u)``.

    Groups have ``lr``, ``weight_decay`` (decoupled, with the rate as it is), ``momentum``, ``nesterov``, ``scaling`` and
    ``products`` (dtype of the Newton-Schulz products).  ``s`` is ``sqrt(max(1, O / I))`` for ``original``, and
    ``0.2 sqrt(max(O, I))`` for ``moonlight`` (arXiv 2502.16982), which gives updates the root mean square of Adam's, so that Adam's
    rates and decay can be kept.  ``halves`` gives the number of matrices in a parameter (of any shape) by its identity.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        scaling: str = "original",
        products: torch.dtype = torch.bfloat16,
        halves: dict[Tensor, int] | None = None,
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "scaling": scaling, "products": products}
        super().__init__(params, defaults)
        self.halves = halves or {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            for p in members:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            if members:
                self._update(group, members)

    def _update(self, group: dict[str, Any], members: list[Tensor]) -> None:
        beta = group["momentum"]
        grads = [local(p.grad) for p in members]
        momenta = [local(self.state[p]["momentum"]) for p in members]
        torch._foreach_lerp_(momenta, grads, 1 - beta)
        if group["lr"] == 0:
            return
        updates = list(torch._foreach_lerp(grads, momenta, beta)) if group["nesterov"] else momenta
        weights = [local(p) for p in members]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        buckets: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for i, p in enumerate(members):
            buckets[(holds_whole_matrices(p), *self._matrix(p), p.dtype, p.device)].append(i)
        for (whole, *_), indices in buckets.items():
            chosen = [members[i] for i in indices]
            step = self._orthogonal if whole else self._orthogonal_of_shards
            for i, direction in zip(indices, step(group, chosen, [updates[i] for i in indices]), strict=True):
                weights[i].add_(direction, alpha=-group["lr"] * scale(group["scaling"], *self._matrix(members[i])))

    def _matrix(self, p: Tensor) -> tuple[int, int]:
        """Outputs and inputs of each matrix of a parameter."""
        return p.shape[-2] // self.halves.get(p, 1), p.shape[-1]

    def _orthogonal(self, group: dict[str, Any], members: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
        """Parameters of one shape of matrix, of which whole ones are here: all of them together."""
        stacks = [update.reshape(-1, *self._matrix(p)) for p, update in zip(members, updates, strict=True)]
        dtype = group["products"]
        if dtype != torch.bfloat16:
            dtype = torch.promote_types(dtype, updates[0].dtype)
        found = orthogonalise(stacks, steps=STEPS, dtype=dtype)
        return [x.view(update.shape) for x, update in zip(found, updates, strict=True)]

    def _orthogonal_of_shards(self, group: dict[str, Any], members: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
        """Matrices that are cut over ranks, one at a time: put together, made orthogonal on every rank, and cut again."""
        directions = []
        for p, update in zip(members, updates, strict=True):
            assert isinstance(p, DTensor)
            (whole,) = self._orthogonal(group, [p], [gathered(update, p)])
            directions.append(like_shard(whole, p))
        return directions


def scale(scaling: str, outputs: int, inputs: int) -> float:
    """Factor of an orthogonal update of a matrix ``[outputs, inputs]``."""
    if scaling == "moonlight":
        return 0.2 * max(outputs, inputs) ** 0.5
    return max(1.0, outputs / inputs) ** 0.5
