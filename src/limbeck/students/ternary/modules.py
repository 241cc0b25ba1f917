"""Modules that compute with ternary weights: Linears and stacked experts, under the names and with the tensors of the base."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.models.experts import routed_experts
from limbeck.ops.ternary import (
    Granularity,
    Method,
    Ternary,
    elastic_start,
    fake_quant,
    round_q8_K,
    round_token,
    scale_shape,
    ternary,
)

LEARNT = "_scale"
"""What the parameter of learnt scales is called after its weight."""
SUB_NORM_EPS = 1e-8
"""Of BitNet and BitDistill: what is normed may be small, and must come out at full size."""
_ROUNDINGS = {"token": round_token, "q8_K": round_q8_K}

if TYPE_CHECKING:
    # What the mixin takes for granted beside it.
    from torch.nn import Module as _Module
else:
    _Module = object


@dataclass(frozen=True)
class Quantiser:
    """How a weight becomes ternary, and how its activations are rounded."""

    scale: Granularity
    group: int | None
    method: Method
    activations: str = "none"
    done: bool = False
    """The weights are codes times scales already, and are computed with as they are."""

    def options(self, parts: int) -> dict[str, Any]:
        """Keywords of the operators."""
        return {"scale": self.scale, "group": self.group, "parts": parts}


class SubNorm(nn.Module):
    """The RMSNorm in front of a ternary projection (SubLN; BitNet b1.58, BitDistill: arXiv 2510.13998): ``w x / rms(x)``.

    Experts of a layer share one.  Computed in at least fp32, also under autocast; the result has the dtype of ``x``.
    """

    def __init__(self, weight: Tensor):
        """In front of ``weight`` ``[*, O, I]``; works on meta."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(weight.shape[-1], dtype=weight.dtype, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """``x [*, I]`` to the same."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + SUB_NORM_EPS)
        return (self.weight * normed).to(x.dtype)


class Quantised(_Module):
    """A module some of whose parameters are computed with as ternary ones.  ``mix`` is lambda: 0 is the base, 1 ternary."""

    quantiser: Quantiser
    parts: dict[str, int]
    """Names of the ternary parameters, and the matrices stacked in the rows of each."""
    mix: float
    normed: str | None = None
    """Name of the parameter in front of which ``sub_norm`` stands."""
    sub_norm: SubNorm

    def quantised(self, name: str) -> Tensor:
        """The parameter as the forward pass multiplies with it, with a straight-through gradient."""
        weight = getattr(self, name)
        if name not in self.parts or self.quantiser.done:
            return weight
        q = self.quantiser
        return fake_quant(weight, method=q.method, learnt=self.learnt(name), mix=self.mix, **q.options(self.parts[name]))

    def rounded(self, name: str, x: Tensor) -> Tensor:
        """What the parameter is multiplied with, ``x [*, I]``: normed where a norm stands before it, and rounded as the options
        say."""
        if name == self.normed:
            x = self.sub_norm(x)
        rounding = _ROUNDINGS.get(self.quantiser.activations)
        return x if rounding is None or name not in self.parts or self.mix == 0.0 else rounding(x, self.mix)

    def learnt(self, name: str) -> Tensor | None:
        """The learnt scales of a parameter, if it has them."""
        return getattr(self, name + LEARNT, None)

    @torch.no_grad()
    def codes(self, name: str, weight: Tensor | None = None, learnt: Tensor | None = None) -> Ternary:
        """Codes and scales of a parameter: what is exported.  ``weight [*, O, I]`` and ``learnt [*, P, G]`` stand in for sharded
        ones."""
        q, weight = self.quantiser, getattr(self, name) if weight is None else weight
        method: Method = "exact" if q.done else q.method
        return ternary(weight, method=method, learnt=self.learnt(name) if learnt is None else learnt, **q.options(self.parts[name]))


class TernaryLinear(Quantised, nn.Linear):
    """A Linear with a ternary weight; the bias, if any, is not."""

    def forward(self, input: Tensor) -> Tensor:
        """``x W^T + b`` of ``input [*, I]``."""
        return F.linear(self.rounded("weight", input), self.quantised("weight"), self.bias)


class TernaryExperts(Quantised):
    """First base of stacked experts: whatever experts implementation the config names, it is the grouped form that runs."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``sum_k weights[t, k] * expert[chosen[t, k]](x[t])``, ``[T, D]``, of ``hidden_states [T, D]``, ``top_k_index [T, K]``
        (int64) and ``top_k_weights [T, K]``."""
        return routed_experts(self, hidden_states, top_k_index, top_k_weights)


@functools.cache
def _experts_class(base: Any) -> Any:
    return type(f"Ternary{base.__name__}", (TernaryExperts, base), {"__module__": base.__module__, "__doc__": "Ternary experts."})


def make_ternary(module: nn.Module, name: str, quantiser: Quantiser, mix: float, parts: int = 1, *, sub_norm: bool = False) -> None:
    """Let ``module`` compute with its parameter ``name``, whose rows are ``parts`` matrices, as a ternary one.

    Its tensors stay what they are; learnt scales, and with ``sub_norm`` the norm in front, are added beside them.  Works on meta.
    """
    made: Any = module
    if not isinstance(made, Quantised):
        kind: Any = type(module)
        made.__class__ = TernaryLinear if issubclass(kind, nn.Linear) else _experts_class(kind)
        made.quantiser, made.parts, made.mix = quantiser, {}, mix
    weight = getattr(made, name)
    made.parts = {**made.parts, name: parts}
    if sub_norm:
        made.normed, made.sub_norm = name, SubNorm(weight)
    if quantiser.method == "elastic":
        shape = scale_shape(tuple(weight.shape), **quantiser.options(parts))
        made.register_parameter(name + LEARNT, nn.Parameter(torch.ones(shape, dtype=weight.dtype, device=weight.device)))


@torch.no_grad()
def start_scales(module: Quantised, name: str) -> None:
    """Set learnt scales to where the squared error is least."""
    learnt = module.learnt(name)
    if learnt is not None:
        learnt.copy_(elastic_start(getattr(module, name), **module.quantiser.options(module.parts[name])))
