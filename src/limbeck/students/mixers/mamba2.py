"""Mamba-2 (arXiv 2405.21060) in the place of softmax attention.

    S <- e^(-dt e^A) S + dt k v^T ;  o = S^T q + D v          dt = softplus(dt(x) + bias)

In the paper's words C = q, B = k and x = v, with one group a head.  Writes are scaled by the step that sets the forget rate, so a read
is a mean over the effective window from the start, and the skip D, which attention has no counterpart for, starts at 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.config.parts.mixers import Mamba2Options
from limbeck.ops.linear_attention import linear_attention, linear_attention_step
from limbeck.students.mixers.base import compute_dtype
from limbeck.students.mixers.linear import MatrixStateMixer, inverse_softplus, log_uniform_rates


class Mamba2(MatrixStateMixer):
    """Linear attention with one step size a head and token, for forgetting and writing."""

    options: Mamba2Options

    def _add_gates(self) -> None:
        heads = self.facts.num_heads
        self.dt_proj = nn.Linear(self.facts.hidden_size, heads, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))

    def _start(self) -> None:
        super()._start()
        nn.init.zeros_(self.dt_proj.weight)
        nn.init.zeros_(self.A_log)
        nn.init.zeros_(self.D)
        self._set_rates(log_uniform_rates(self.options.step_init, self.facts.num_heads))

    def _set_rates(self, rates_H: Tensor) -> list[str]:
        self.dt_bias.copy_(inverse_softplus(rates_H))
        return ["dt_bias"]

    def _gates(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """Log decay and step ``[B, T, H]``."""
        dtype = compute_dtype(x_BTD, self.o_proj.weight)
        step_BTH = F.softplus(self.dt_proj(x_BTD).to(dtype) + self.dt_bias.to(dtype))
        return -self.A_log.to(dtype).exp() * step_BTH, step_BTH

    def _gate_flops(self) -> int:
        return 2 * self.facts.hidden_size * self.facts.num_heads

    def _rule(self, *inputs: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k, v, g, step = inputs
        o, state = linear_attention(q, k * step[..., None], v, g, **kwargs)
        return self._skip(o, v), state

    def _step(self, *inputs: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v, g, step, state = inputs
        o, state = linear_attention_step(q, k * step[..., None], v, g, state, scale=scale)
        return self._skip(o, v), state

    def _skip(self, o: Tensor, v: Tensor) -> Tensor:
        return o + (self.D[:, None] * v).to(o.dtype)
