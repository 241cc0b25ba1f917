"""One optimiser over groups of parameters, AdamW, Muon or Lion by group; its state is flattened by parameter name for checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.config.parts.stages import GroupOptions, OptimOptions
from limbeck.engine.lion import Lion
from limbeck.engine.muon import Muon, halves_of, is_matrix
from limbeck.errors import RunError

Groups = Sequence[tuple[GroupOptions, Sequence[tuple[str, nn.Parameter]]]]
"""Options and the named parameters that they claim."""


def group_label(options: GroupOptions, index: int) -> str:
    """What a group is called in logs: its role, its pattern, or its number."""
    return options.role or options.match or str(index)


def build_optimizer(groups: Groups, options: OptimOptions) -> torch.optim.Optimizer:
    """One optimiser over ``groups``, of whatever kinds; vectors (norms, biases, decays) are not decayed unless a group says so.

    Each torch group carries ``label`` (for logs), ``peak_lr`` (what the schedule multiplies) and ``full_decay``.  AdamW alone is torch's own, fused
    where torch can; several kinds are a :class:`Mixed`.  Vectors in a Muon group are a :class:`RunError`.
    """
    by_kind: dict[str, list[dict[str, Any]]] = {}
    halves: dict[Tensor, int] = {}
    for index, (group, parameters) in enumerate(groups):
        label = group_label(group, index)
        if group.kind == "muon":
            halves.update(_halves(label, parameters))
        vectors = [p for _, p in parameters if p.ndim < 2 and not group.decay_vectors]
        matrices = [p for _, p in parameters if p.ndim >= 2 or group.decay_vectors]
        for members, decay in ((matrices, group.weight_decay), (vectors, 0.0)):
            if members:
                settings = {"lr": group.lr, "weight_decay": decay, "label": label, "peak_lr": group.lr, "full_decay": decay}
                by_kind.setdefault(group.kind, []).append({"params": members, **settings, **_settings(group)})
    if not by_kind:
        raise RunError("optim.groups claim no parameter, so nothing would train: add a group with only a learning rate, or see what `student.train` names")
    parts: list[torch.optim.Optimizer] = []
    if adamw := by_kind.get("adamw"):
        devices = {p.device.type for g in adamw for p in g["params"]}
        parts.append(torch.optim.AdamW(adamw, betas=options.betas, eps=options.eps, fused=devices <= {"cpu", "cuda"}))
    if lion := by_kind.get("lion"):
        parts.append(Lion(lion))
    if muon := by_kind.get("muon"):
        parts.append(Muon(muon, halves=halves))
    return parts[0] if len(parts) == 1 else Mixed(parts)


class Mixed(torch.optim.Optimizer):
    """Several optimisers, each with parameters of its own, as one: one step, one list of groups, one state."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        super().__init__([{"params": group["params"]} for part in parts for group in part.param_groups], {})
        self.parts = tuple(parts)
        # The groups are the parts' own, so that a rate that is set here is theirs; so is the state.
        self.param_groups = [group for part in parts for group in part.param_groups]
        for part in parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step of each."""
        for part in self.parts:
            part.step()


def _settings(group: GroupOptions) -> dict[str, Any]:
    """What a group's kind takes beside rate and decay."""
    if group.kind == "muon":
        products = getattr(torch, group.newton_schulz)
        return {"momentum": group.momentum, "nesterov": group.nesterov, "scaling": group.scaling, "products": products}
    return {} if group.betas is None else {"betas": group.betas}


def _halves(label: str, parameters: Sequence[tuple[str, nn.Parameter]]) -> dict[Tensor, int]:
    """The number of matrices side by side in each parameter of a Muon group; what is no matrix is refused by name."""
    vectors = [name for name, p in parameters if not is_matrix(p)]
    if vectors:
        more = f" and {len(vectors) - 4} more" if len(vectors) > 4 else ""
        raise RunError(
            f"optim.groups '{label}': Muon orthogonalises matrices, and {', '.join(vectors[:4])}{more} are vectors: claim them in an earlier "
            "group of kind lion or adamw, by role or `match`"
        )
    numbers = {name: (p, halves_of(name)) for name, p in parameters}
    for name, (p, number) in numbers.items():
        if p.shape[-2] % number:
            raise RunError(f"optim.groups '{label}': {name} has {p.shape[-2]} outputs, which are not {number} matrices of one size")
    return dict(numbers.values())


def set_rates(optimizer: torch.optim.Optimizer, factor: float, decays: bool = True) -> dict[str, float]:
    """Set every group's learning rate to ``factor`` times its peak, and its decay to what it is, or 0; returns the rates by label."""
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        group["weight_decay"] = group["full_decay"] if decays else 0.0
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


def first_nonfinite(names: Mapping[nn.Parameter, str]) -> str:
    """The first parameter with a gradient on this rank that is not finite; if each is, only their sum is not."""
    for parameter, name in names.items():
        grad = parameter.grad
        local = getattr(grad, "to_local", lambda grad=grad: grad)()
        if local is not None and not bool(torch.isfinite(local).all()):
            return name
    return "the sum over all of them"


def global_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm of all gradients, over all shards, as a plain scalar."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=None)
    # On sharded parameters it is a DTensor: branching on its local part would send ranks different ways.
    full = getattr(norm, "full_tensor", None)
    return full() if full else norm
