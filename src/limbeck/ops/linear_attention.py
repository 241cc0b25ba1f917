"""Linear attention with decay: one decode step, and the chunked form.

    S <- diag(e^g) S + k v^T ;   o = scale * S^T q

``g <= 0`` is a log decay for every head (RetNet, Lightning, Mamba-2: arXiv 2307.08621, 2405.21060) or for every head and key channel
(GLA, arXiv 2312.06635; HGRN2).  The state decays before the token is written, so a token is always read in full.

Shape legend: B rows, T tokens, H heads, K key width, V value width.  Packed rows: ``documents_BT`` numbers the document of every
token.  The state is wiped where a new document begins within a row; a row's first document continues the initial state.  -1 is
padding, and padding is transparent wherever it stands: it reads zero and leaves the state as it was.

Inside a chunk everything is a few batched products (:mod:`limbeck.ops.channel_decay`, which has the one backward pass that is written
by hand), and between chunks the loop does no more than ``S' = survive * S + what was written``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.ops.backends import with_fla
from limbeck.ops.channel_decay import chunked_rows, common_dtype
from limbeck.ops.chunks import chunk_size, to_chunks, to_tokens


@with_fla
def linear_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g: Tensor,
    *,
    documents_BT: Tensor | None = None,
    initial_state_BHKV: Tensor | None = None,
    scale: float | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The recurrence over whole rows, in parallel within chunks of tokens.

    ``g [B, T, H]`` or ``[B, T, H, K]`` is the log decay (<= 0); ``scale`` defaults to ``K ** -0.5``.  ``chunk`` (rounded up to a
    power of two) changes the speed, never the result.  Returns ``(o_BTHV, final_state_BHKV)``: outputs in the dtype of ``v``, the
    state in the dtype computed in, which is fp64 when any input is and otherwise fp32, under autocast too.  Gradients flow to q, k, v,
    g and the initial state.
    """
    scale = k_BTHK.shape[-1] ** -0.5 if scale is None else scale
    dtype = common_dtype(q_BTHK, k_BTHK, v_BTHV, g, initial_state_BHKV)
    num_tokens, out_dtype = v_BTHV.shape[1], v_BTHV.dtype
    size = chunk_size(chunk, num_tokens)
    with torch.autocast(v_BTHV.device.type, enabled=False):
        q, k, v, g = (x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV, g))
        made = chunked_rows((q * scale,), k, g, documents_BT, size)
        values = to_chunks(v, size)
        written = (made.keys * made.leave).mT @ values
        state = written.new_zeros(written.shape[1:]) if initial_state_BHKV is None else initial_state_BHKV.to(dtype)
        states = [state]
        for c in range(written.shape[0]):
            states.append(torch.addcmul(written[c], states[-1], made.survive[c]))
        entering = torch.stack(states[:-1])
        o = made.scores[..., 0, :, :] @ values + (made.rows[..., 0, :, :] * made.enter) @ entering
    return to_tokens(o, num_tokens).to(out_dtype), states[-1]


def linear_attention_step(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, g: Tensor, state_BHKV: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token: ``(o_BHV, new_state_BHKV)``, computed in the state's dtype; ``g`` is ``[B, H]`` or ``[B, H, K]``."""
    scale = k_BHK.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, g = (x.to(state_BHKV.dtype) for x in (q_BHK, k_BHK, v_BHV, g))
    g_BHW = g[..., None] if g.ndim == k.ndim - 1 else g
    state_BHKV = state_BHKV * g_BHW.exp()[..., None] + k[..., None] * v[..., None, :]
    return ((state_BHKV * q[..., None]).sum(-2) * scale).to(v_BHV.dtype), state_BHKV
