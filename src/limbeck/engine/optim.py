"""AdamW with groups: the only optimiser so far, its state flattened by parameter name for checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.config.parts.stages import GroupOptions, OptimOptions
from limbeck.errors import RunError

Groups = Sequence[tuple[GroupOptions, Sequence[tuple[str, nn.Parameter]]]]
"""Options and the named parameters that they claim."""


def group_label(options: GroupOptions, index: int) -> str:
    """What a group is called in logs: its role, its pattern, or its number."""
    return options.role or options.match or str(index)


def build_optimizer(groups: Groups, options: OptimOptions) -> torch.optim.AdamW:
    """AdamW over ``groups``; vectors (norms, biases, decays) are not decayed unless a group says so.  Fused where torch can.

    Each torch group carries ``label`` (for logs) and ``peak_lr`` (what the schedule multiplies).
    """
    torch_groups: list[dict[str, Any]] = []
    for index, (group, parameters) in enumerate(groups):
        label = group_label(group, index)
        vectors = [p for _, p in parameters if p.ndim < 2 and not group.decay_vectors]
        matrices = [p for _, p in parameters if p.ndim >= 2 or group.decay_vectors]
        for members, decay in ((matrices, group.weight_decay), (vectors, 0.0)):
            if members:
                torch_groups.append(
                    {"params": members, "lr": group.lr, "weight_decay": decay, "label": label, "peak_lr": group.lr}
                )
    if not torch_groups:
        raise RunError("optim.groups claim no parameter: nothing would train")
    devices = {p.device.type for g in torch_groups for p in g["params"]}
    return torch.optim.AdamW(torch_groups, betas=options.betas, eps=options.eps, fused=devices <= {"cpu", "cuda"})


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set every group to ``factor`` times its peak; returns the rates by label."""
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        rates[group["label"]] = group["lr"]
    return rates


def materialise_state(optimizer: torch.optim.Optimizer) -> None:
    """Give a fresh optimiser its state tensors, so that a checkpoint can be loaded into them.

    A step with zero gradients at learning rate zero moves no weight; it is counted, and that count is taken back, or Adam's bias
    correction would start one step late and the first updates come out a quarter too small.
    """
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


def flat_state(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str]) -> dict[str, Tensor]:
    """The optimiser's own state tensors (not copies) as ``{"exp_avg/<parameter>": tensor}``."""
    return {
        f"{key}/{names[p]}": value
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def global_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm of all gradients, over all shards, as a plain scalar."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=None)
    # On sharded parameters it is a DTensor: branching on its local part would send ranks different ways.
    full = getattr(norm, "full_tensor", None)
    return full() if full else norm
