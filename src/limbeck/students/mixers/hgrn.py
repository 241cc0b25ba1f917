"""HGRN2 (arXiv 2404.07904) in the place of softmax attention: linear attention whose key is what the forget gate lets go.

    f = 1 - span * sigmoid(k) ;   S <- diag(f) S + (1 - f) v^T ;   o = S^T softmax(q)

``1 - span`` is the lower bound of the forget gate.  A row of the state is a moving average of values, and the read weighs the rows by
numbers that sum to one: an output is a convex combination of past values, as the attention's is, and has its scale.

On a small code model (8 layers) the fresh error is 0.74 of the attention's power in the mean over layers and 0.43 in the first, where
Gated DeltaNet has 0.73 and 1.15; with a norm on the output the first layer's is 211.

The paper lets the lower bound rise over the layers and reads with SiLU(q) under a norm.  Here layers are aligned one by one and
replace the same kind of attention, so each layer learns a bound for every head, and the bounds start spread over the heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.config.parts.mixers import Hgrn2Options
from limbeck.ops.linear_attention import linear_attention, linear_attention_step
from limbeck.students.mixers.base import compute_dtype
from limbeck.students.mixers.linear import MatrixStateMixer, log_uniform_rates

LOWEST = 1e-4
"""A forget gate never shuts completely: its logarithm has a gradient everywhere."""


class Hgrn2(MatrixStateMixer):
    """Outer-product state expansion with lower-bounded forget gates; the key projection becomes the gate's."""

    options: Hgrn2Options

    def _add_gates(self) -> None:
        self.span_logit = nn.Parameter(torch.empty(self.facts.num_heads))

    def _start(self) -> None:
        super()._start()
        self._set_rates(log_uniform_rates(self.options.decay_init, self.facts.num_heads))

    def _set_rates(self, rates_H: Tensor) -> list[str]:
        # A gate of an input of zero is half open: it forgets half of its span.
        self.span_logit.copy_((2 * rates_H / (1 - LOWEST)).logit())
        return ["span_logit"]

    def _gates(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """The gates' span ``[B, T, H]``: at zero nothing is forgotten and nothing written."""
        span_H = (1 - LOWEST) * self.span_logit.to(compute_dtype(x_BTD, self.o_proj.weight)).sigmoid()
        return (span_H.expand(*x_BTD.shape[:2], -1),)

    def _gate_flops(self) -> int:
        return 0

    def _shorten(self, x_BTHK: Tensor) -> Tensor:
        """Channels of unit mean square, or the attention's own scale on both sides of its scores."""
        if self.options.qk_norm == "l2":
            return super()._shorten(x_BTHK) * self.facts.head_dim**0.5
        return x_BTHK.to(compute_dtype(x_BTHK)) * self.facts.scaling**0.5

    def _rule(self, *inputs: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k, v, span = inputs
        write, g = _forget(k, span)
        return linear_attention(q.softmax(-1), write, v, g, **kwargs)

    def _step(self, *inputs: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v, span, state = inputs
        write, g = _forget(k, span)
        return linear_attention_step(q.softmax(-1), write, v, g, state, scale=scale)


def _forget(k: Tensor, span: Tensor) -> tuple[Tensor, Tensor]:
    """``1 - f`` and ``log f``, ``[..., H, K]`` each."""
    write = span[..., None] * k.sigmoid()
    return write, torch.log1p(-write)
