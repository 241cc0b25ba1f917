"""Lightning attention (arXiv 2401.04658) in the place of softmax attention: linear attention with a fixed forget rate a head.

    S <- e^-slope S + k v^T ;  o = scale S^T q

The slopes are not learned, so every head keeps its time scale: log-uniform, as ALiBi's are.
"""

from __future__ import annotations

from torch import Tensor

from limbeck.config.parts.mixers import LightningAttentionOptions
from limbeck.students.mixers.base import compute_dtype
from limbeck.students.mixers.linear import DecayingMixer, log_uniform_rates


class LightningAttention(DecayingMixer):
    """Linear attention without a forget gate."""

    options: LightningAttentionOptions

    def _rates(self) -> Tensor:
        return log_uniform_rates(self.options.slopes, self.facts.num_heads)

    def _gates(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """Log decay ``[B, T, H]``, the same at every token."""
        dtype = compute_dtype(x_BTD, self.o_proj.weight)
        return (-self._rates().to(x_BTD.device, dtype).expand(*x_BTD.shape[:2], -1),)
