"""The delta rule with a decay for every key channel (Kimi Delta Attention, arXiv 2510.26692).

    S <- diag(e^g) S ;   S <- S + k (beta (v - S^T k))^T ;   o = scale * S^T q

With one decay in all channels it is the gated delta rule, :mod:`limbeck.ops.delta_rule`, whose words on key length, packing and padding
hold here too, and whose single step takes a decay for every channel as well.  In a chunk with entering state ``S``
the corrections ``v~_i = beta_i (v_i - S_i^T k_i)`` solve

    (I + A) v~ = beta v - (beta e^G k) S          A_ij = beta_i sum_c k_ic k_jc e^(G_ic - G_jc),  j < i
    o          = scale (e^G q) S + P v~           P_ij = scale sum_c q_ic k_jc e^(G_ic - G_jc),  j <= i
    S'         = e^(G_C) S + (e^(G_C - G) k)^T v~

with ``G`` the sum of the log decays up to and including a token; :mod:`limbeck.ops.channel_decay` makes A and P without ever forming
``e^-G``.  Shape legend: B rows, T tokens, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.ops.backends import with_fla
from limbeck.ops.channel_decay import chunked_rows, common_dtype
from limbeck.ops.chunked_delta_rule import unit_lower_inverse
from limbeck.ops.chunks import chunk_size, to_chunks, to_tokens


@with_fla
def kimi_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    beta_BTH: Tensor,
    *,
    documents_BT: Tensor | None = None,
    initial_state_BHKV: Tensor | None = None,
    scale: float | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The rule over whole rows, in parallel within chunks of tokens.

    ``g_BTHK`` is the log decay (<= 0), ``beta_BTH`` the writing strength, ``scale`` defaults to ``K ** -0.5``.  ``chunk`` (rounded up
    to a power of two) changes the speed, never the result.  Returns ``(o_BTHV, final_state_BHKV)``: outputs in the dtype of ``v``, the
    state in the dtype computed in, which is fp64 when any input is and otherwise fp32, under autocast too.  Gradients flow to q, k, v,
    g, beta and the initial state; there is no double backward.
    """
    scale = k_BTHK.shape[-1] ** -0.5 if scale is None else scale
    dtype = common_dtype(q_BTHK, k_BTHK, v_BTHV, g_BTHK, beta_BTH, initial_state_BHKV)
    num_tokens, out_dtype = v_BTHV.shape[1], v_BTHV.dtype
    size = chunk_size(chunk, num_tokens)
    with torch.autocast(v_BTHV.device.type, enabled=False):
        q, k, v, g, beta = (x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTHK, beta_BTH))
        made = chunked_rows((q * scale, k), k, g, documents_BT, size)
        strength = to_chunks(beta, size)[..., None]
        inverse = _UnitLowerInverse.apply(-strength * made.scores[..., 1, :, :])
        q_rows, k_rows = (made.rows * made.enter.unsqueeze(-3)).unbind(-3)
        own, against = inverse @ (strength * to_chunks(v, size)), inverse @ (strength * k_rows)
        writes = (made.keys * made.leave).mT
        state = own.new_zeros(*writes.shape[1:-1], v.shape[-1]) if initial_state_BHKV is None else initial_state_BHKV.to(dtype)
        states, corrections = [state], []
        for c in range(own.shape[0]):
            corrections.append(own[c] - against[c] @ states[-1])
            states.append(states[-1] * made.survive[c] + writes[c] @ corrections[-1])
        o = q_rows @ torch.stack(states[:-1]) + made.scores[..., 0, :, :] @ torch.stack(corrections)
    return to_tokens(o, num_tokens).to(out_dtype), states[-1]


class _UnitLowerInverse(torch.autograd.Function):
    """``(I - Z)^-1 [..., C, C]`` for strictly lower ``Z``; what stands on or above its diagonal is not read."""

    @staticmethod
    def forward(ctx: Any, strict: Tensor) -> Tensor:
        inverse = unit_lower_inverse(strict.flatten(0, -3)).view(strict.shape)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dinverse: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return (inverse.mT @ dinverse @ inverse.mT).tril(-1)
