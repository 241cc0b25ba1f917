"""Kimi Delta Attention (arXiv 2510.26692) in the place of softmax attention: the delta rule with a decay for every key channel.

    S <- diag(e^g) S ;  S <- S + k (beta (v - S^T k))^T ;  o = S^T q     g = -e^A softplus(up(down(x)) + dt)

It starts as a fresh Gated DeltaNet does, all channels of a head with the head's forget rate, up to the small random weights of ``up``
without which neither of the two linears would have a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.config.parts.mixers import KimiDeltaAttentionOptions
from limbeck.ops.delta_rule import gated_delta_rule_step
from limbeck.ops.kda import kimi_delta_rule
from limbeck.students.mixers.base import compute_dtype
from limbeck.students.mixers.gated_deltanet import DeltaRuleMixer
from limbeck.students.mixers.linear import UP_STD, inverse_softplus, log_uniform_rates


class KimiDeltaAttention(DeltaRuleMixer):
    """The delta rule with one forget gate a key channel, made of the input by two linears of low rank."""

    options: KimiDeltaAttentionOptions

    def _add_decay(self) -> None:
        facts, rank = self.facts, self.options.decay_rank
        width = facts.num_heads * facts.head_dim
        self.a_down = nn.Linear(facts.hidden_size, rank, bias=False)
        self.a_up = nn.Linear(rank, width, bias=False)
        self.A_log = nn.Parameter(torch.empty(facts.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(width))

    def _start(self) -> None:
        super()._start()
        self.a_down.reset_parameters()
        nn.init.normal_(self.a_up.weight, std=UP_STD)
        nn.init.zeros_(self.A_log)
        self._set_rates(log_uniform_rates(self.options.decay_init, self.facts.num_heads))

    def _set_rates(self, rates_H: Tensor) -> list[str]:
        self.dt_bias.copy_(inverse_softplus(rates_H).repeat_interleave(self.facts.head_dim))
        return ["dt_bias"]

    def _log_decay(self, x_BTD: Tensor) -> Tensor:
        dtype = compute_dtype(x_BTD, self.o_proj.weight)
        step_BTHK = F.softplus(self.a_up(self.a_down(x_BTD)).to(dtype) + self.dt_bias.to(dtype)).unflatten(-1, (self.facts.num_heads, -1))
        return -self.A_log.to(dtype).exp()[:, None] * step_BTHK

    def _decay_flops(self) -> int:
        return 2 * self.options.decay_rank * (self.facts.hidden_size + self.facts.num_heads * self.facts.head_dim)

    def _rule(self, *inputs: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta = inputs
        return kimi_delta_rule(q, k, v, g, beta, **kwargs)

    def _step(self, *inputs: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta, state = inputs
        return gated_delta_rule_step(q, k, v, g, beta, state, scale=scale)
