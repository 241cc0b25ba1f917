"""Gated DeltaNet (arXiv 2412.06464) in the place of softmax attention.

    S <- e^g S ;  S <- S + k (beta (v - S^T k))^T ;  o = S^T q          g = -e^A softplus(a(x) + dt),  beta = sigmoid(b(x))

around it what :mod:`limbeck.students.mixers.linear` says; q and k are of unit length.

A fresh mixer is a plain decaying memory over the attention's own projections: the forget rates are set by ``decay_init`` alone
(a = 0), and every write has strength 1/2 (b = 0).

Scale: reading a stored unit key gives its value back, so an output has the scale of values, as the attention's has.  On a small code
model the first layer's fresh error was ten times its output with a norm, and 1.3 times without.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.config.parts.mixers import DeltaRuleOptions, GatedDeltaNetOptions
from limbeck.ops.delta_rule import gated_delta_rule, gated_delta_rule_step
from limbeck.students.mixers.base import compute_dtype
from limbeck.students.mixers.linear import MatrixStateMixer, inverse_softplus, log_uniform_rates


class DeltaRuleMixer(MatrixStateMixer):
    """Write strength and second linears, which all mixers with a delta rule share."""

    options: DeltaRuleOptions
    operations = 7

    def _add_gates(self) -> None:
        model, width = self.facts.hidden_size, self.facts.num_heads * self.facts.head_dim
        if self.options.deep_kv:
            self.k_deep, self.v_deep = nn.Linear(width, width), nn.Linear(width, width)
        self._add_decay()
        if self.options.beta == "learned":
            self.b_proj = nn.Linear(model, self.facts.num_heads, bias=False)

    def _add_decay(self) -> None:
        """Make the parameters of the forget gate; there is none here."""

    def _log_decay(self, x_BTD: Tensor) -> Tensor:
        """Log decay ``[B, T, H]`` or ``[B, T, H, K]``, at least fp32: a rate near 1 has no bits left in bf16."""
        return torch.zeros(*x_BTD.shape[:2], self.facts.num_heads, dtype=compute_dtype(x_BTD, self.o_proj.weight), device=x_BTD.device)

    def _decay_flops(self) -> int:
        return 0

    def _start(self) -> None:
        super()._start()
        if self.options.deep_kv:
            for linear in (self.k_deep, self.v_deep):
                nn.init.eye_(linear.weight)
                nn.init.zeros_(linear.bias)
        if self.options.beta == "learned":
            nn.init.zeros_(self.b_proj.weight)

    def _gate_flops(self) -> int:
        facts, options = self.facts, self.options
        width = facts.num_heads * facts.head_dim
        strength = 2 * facts.hidden_size * facts.num_heads * (options.beta == "learned")
        return strength + self._decay_flops() + 4 * width * width * options.deep_kv

    @property
    def _scale(self) -> float:
        """Factor of the read-out.  Reading a stored unit key gives its value back, so 1; under a norm the factor has no effect but for
        its epsilon, and head_dim ** -0.5 is what implementations of Gated DeltaNet have there."""
        return self.facts.head_dim**-0.5 if self.options.output_norm else 1.0

    def _keys_and_values(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super()._keys_and_values(x_BTD)
        return (self.k_deep(k), self.v_deep(v)) if self.options.deep_kv else (k, v)

    def _gates(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """Log decay and write strength."""
        g = self._log_decay(x_BTD)
        if self.options.beta == "learned":
            return g, self.b_proj(x_BTD).to(g.dtype).sigmoid()
        return g, torch.ones(g.shape[:3], dtype=g.dtype, device=g.device)

    def _rule(self, *inputs: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta = inputs
        return gated_delta_rule(q, k, v, g, beta, **kwargs)

    def _step(self, *inputs: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta, state = inputs
        return gated_delta_rule_step(q, k, v, g, beta, state, scale=scale)


class GatedDeltaNet(DeltaRuleMixer):
    """The delta rule with one forget gate a head."""

    options: GatedDeltaNetOptions

    def _add_decay(self) -> None:
        if self.options.decay == "learned":
            heads = self.facts.num_heads
            self.a_proj = nn.Linear(self.facts.hidden_size, heads, bias=False)
            self.A_log = nn.Parameter(torch.empty(heads))
            self.dt_bias = nn.Parameter(torch.empty(heads))

    def _start(self) -> None:
        super()._start()
        if self.options.decay == "learned":
            nn.init.zeros_(self.a_proj.weight)
            nn.init.zeros_(self.A_log)
            self._set_rates(log_uniform_rates(self.options.decay_init, self.facts.num_heads))

    def _set_rates(self, rates_H: Tensor) -> list[str]:
        if self.options.decay == "none":
            return []
        self.dt_bias.copy_(inverse_softplus(rates_H))
        return ["dt_bias"]

    def _log_decay(self, x_BTD: Tensor) -> Tensor:
        if self.options.decay == "none":
            return super()._log_decay(x_BTD)
        dtype = compute_dtype(x_BTD, self.o_proj.weight)
        return -self.A_log.to(dtype).exp() * F.softplus(self.a_proj(x_BTD).to(dtype) + self.dt_bias.to(dtype))

    def _decay_flops(self) -> int:
        return 2 * self.facts.hidden_size * self.facts.num_heads * (self.options.decay == "learned")
