"""Gated linear attention (arXiv 2312.06635) in the place of softmax attention.

    S <- diag(e^g) S + k v^T ;  o = scale S^T q          g = logsigmoid(up(down(x)) + bias) / temperature

``g`` is of low rank; the small random weights of ``up`` are what lets gradients through both linears.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.config.parts.mixers import GatedLinearAttentionOptions
from limbeck.students.mixers.base import compute_dtype
from limbeck.students.mixers.linear import UP_STD, DecayingMixer, log_uniform_rates


class GatedLinearAttention(DecayingMixer):
    """Linear attention with one forget gate a key channel."""

    options: GatedLinearAttentionOptions

    def _add_decay(self) -> None:
        facts, rank = self.facts, self.options.decay_rank
        self.a_down = nn.Linear(facts.hidden_size, rank, bias=False)
        self.a_up = nn.Linear(rank, facts.num_heads * facts.head_dim)

    def _rates(self) -> Tensor:
        return log_uniform_rates(self.options.decay_init, self.facts.num_heads)

    def _start(self) -> None:
        super()._start()
        self.a_down.reset_parameters()
        nn.init.normal_(self.a_up.weight, std=UP_STD)
        self._set_rates(self._rates())

    def _set_rates(self, rates_H: Tensor) -> list[str]:
        # logsigmoid(b) = -temperature * rate
        bias_H = -(rates_H * self.options.decay_temperature).expm1().log()
        self.a_up.bias.copy_(bias_H.repeat_interleave(self.facts.head_dim))
        return ["a_up.bias", *self._set_read_scale(rates_H)]

    def _gates(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """Log decay ``[B, T, H, K]``."""
        dtype = compute_dtype(x_BTD, self.o_proj.weight)
        g = F.logsigmoid(self.a_up(self.a_down(x_BTD)).to(dtype)) / self.options.decay_temperature
        return (g.unflatten(-1, (self.facts.num_heads, -1)),)

    def _gate_flops(self) -> int:
        return 2 * self.options.decay_rank * (self.facts.hidden_size + self.facts.num_heads * self.facts.head_dim)
