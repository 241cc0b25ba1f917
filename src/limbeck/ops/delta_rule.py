"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464): one decode step, and the chunked form.

A matrix state ``S`` [K, V] is a memory of key -> value pairs.  At every token it decays, then the value stored under the key is
moved towards the new one, then it is read:

    S <- exp(g) S ;   S <- S + k (beta (v - S^T k))^T ;   o = scale * S^T q

The decay comes *before* the delta read, as in the paper's reference implementation.  Keys must be short (|k| <= 1 for beta
<= 1), or the rule is unstable in any form.

Shape legend: B rows, T tokens, H heads, K key width, V value width.  Packed rows: ``documents_BT`` numbers the document of every
token.  The state is wiped where a new document begins within a row; a row's first document continues the initial state.  -1 is
padding, and padding is transparent wherever it stands: it reads zero and leaves the state as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.ops.backends import with_fla
from limbeck.ops.chunked_delta_rule import Gates, chunked_delta_rule
from limbeck.ops.chunks import chunk_size
from limbeck.ops.packing import document_segments


@with_fla
def gated_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    documents_BT: Tensor | None = None,
    initial_state_BHKV: Tensor | None = None,
    scale: float | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The rule over whole rows, in parallel within chunks of tokens.

    ``g_BTH`` is the log decay (<= 0), ``beta_BTH`` the writing strength, ``scale`` defaults to ``K ** -0.5``.  ``chunk``
    (rounded up to a power of two) changes the speed, never the result.  Returns ``(o_BTHV, final_state_BHKV)``: outputs in
    the dtype of ``v``, the state in the dtype computed in, which is fp64 for fp64 inputs and otherwise fp32, under autocast
    too. Gradients flow to q, k, v, g, beta and the initial state; there is no double backward.
    """
    scale = k_BTHK.shape[-1] ** -0.5 if scale is None else scale
    size = chunk_size(chunk, v_BTHV.shape[1])
    segments_BT = real_BT = None
    if documents_BT is not None:
        real_BT, segments_BT = document_segments(documents_BT)
        g_BTH = torch.where(real_BT[..., None], g_BTH, 0)
        beta_BTH = torch.where(real_BT[..., None], beta_BTH, 0)
    gates = Gates(size, scale, segments_BT, real_BT)
    return chunked_delta_rule(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, initial_state_BHKV, gates)


def gated_delta_rule_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    g: Tensor,
    beta_BH: Tensor,
    state_BHKV: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token: ``(o_BHV, new_state_BHKV)``, computed in the state's dtype; the output has the dtype of ``v``.

    ``g`` is ``[B, H]``, one log decay a head, or ``[B, H, K]``, one a key channel, which is :mod:`limbeck.ops.kda`'s rule.
    """
    scale = k_BHK.shape[-1] ** -0.5 if scale is None else scale
    dtype = state_BHKV.dtype
    q_BHK, k_BHK, v, g, beta_BH = (x.to(dtype) for x in (q_BHK, k_BHK, v_BHV, g, beta_BH))
    decay = g.exp()[..., None]
    state_BHKV = state_BHKV * (decay if g.ndim == k_BHK.ndim else decay[..., None])
    error_BHV = (v - (state_BHKV * k_BHK[..., None]).sum(-2)) * beta_BH[..., None]
    state_BHKV = state_BHKV + k_BHK[..., None] * error_BHV[..., None, :]
    o_BHV = (state_BHKV * q_BHK[..., None]).sum(-2) * scale
    return o_BHV.to(v_BHV.dtype), state_BHKV
