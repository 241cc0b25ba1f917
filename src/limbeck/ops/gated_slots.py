"""Gated slot attention (arXiv 2409.07146): a softmax over a fixed number of slots, each a moving average of keys and values.

    Kt <- diag(e^g) Kt + (1 - e^g) k^T ;   Vt <- diag(e^g) Vt + (1 - e^g) v^T ;   o = Vt^T softmax(scale * Kt q)

``g <= 0`` has one entry a slot.  It is two linear attentions with a softmax between: the second has the slots as key channels; the
first has them as value channels, and its decay is on the side that is not summed over (:func:`decayed_sums`).

Shape legend: B rows, T tokens, H heads, K key width, V value width, M slots.  Packing and padding as in
:mod:`limbeck.ops.linear_attention`.  The state is ``[B, H, M, K + V]``, slots' keys beside their values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.ops.backends import with_fla
from limbeck.ops.channel_decay import common_dtype
from limbeck.ops.chunks import FLOOR, chunk_masks, chunk_size, to_chunks, to_tokens
from limbeck.ops.linear_attention import linear_attention
from limbeck.ops.packing import document_segments


@with_fla
def gated_slot_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHM: Tensor,
    *,
    documents_BT: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Whole rows, in parallel within chunks of tokens.

    ``initial_state [B, H, M, K + V]`` is zero by default, ``scale`` is ``K ** -0.5``.  ``chunk`` (rounded up to a power of two)
    changes the speed, never the result.  Returns ``(o_BTHV, final_state [B, H, M, K + V])``: outputs in the dtype of ``v``, the
    state in the dtype computed in, which is fp64 when any input is and otherwise fp32, under autocast too.  Gradients flow to q,
    k, v, g and the initial state.
    """
    scale = k_BTHK.shape[-1] ** -0.5 if scale is None else scale
    dtype = common_dtype(q_BTHK, k_BTHK, v_BTHV, g_BTHM, initial_state)
    with torch.autocast(v_BTHV.device.type, enabled=False):
        q, k, g = (x.to(dtype) for x in (q_BTHK, k_BTHK, g_BTHM))
        if documents_BT is not None:
            g = torch.where((documents_BT >= 0)[..., None, None], g, 0)
        write = -torch.expm1(g)
        widths = [k.shape[-1], v_BTHV.shape[-1]]
        keys, values = (None, None) if initial_state is None else initial_state.to(dtype).split(widths, -1)
        scores_BTHM, keys = _slot_scores(q * scale, k, write, g, documents_BT, keys, chunk)
        o, values = linear_attention(
            scores_BTHM.softmax(-1), write, v_BTHV, g, documents_BT=documents_BT, initial_state_BHKV=values, scale=1.0, chunk=chunk
        )
    return o, torch.cat([keys, values], -1)


def _slot_scores(
    q: Tensor, k: Tensor, write: Tensor, g: Tensor, documents_BT: Tensor | None, keys_BHMK: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Products of queries with the slots' keys ``[B, T, H, M]``, and the keys after the last token."""
    num_tokens = q.shape[1]
    size = chunk_size(chunk, num_tokens)
    real_BT, segments_BT = (None, None) if documents_BT is None else document_segments(documents_BT)
    masks = chunk_masks(segments_BT, real_BT, size, q.device)
    queries, keys, write, decay = (to_chunks(x, size) for x in (q, k, write, g.clamp_min(FLOOR)))
    products = torch.where(masks.reads, queries @ keys.mT, 0)
    sums, since, until = decayed_sums(products, write, decay)
    enter, leave = (x.clamp_min(FLOOR).exp() for x in (since, until))
    survive = torch.where(masks.survives[..., None], enter[..., -1, :, None], 0)
    enter, leave = torch.where(masks.enters[..., None], enter, 0), torch.where(masks.stays[..., None], leave, 0)
    written = (write * leave).mT @ keys
    states = [written.new_zeros(written.shape[1:]) if keys_BHMK is None else keys_BHMK]
    for c in range(written.shape[0]):
        states.append(torch.addcmul(written[c], states[-1], survive[c]))
    found = sums + (queries @ torch.stack(states[:-1]).mT) * enter
    return to_tokens(found, num_tokens), states[-1]


def decayed_sums(products: Tensor, write: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_j<=i  products_ij  write_jm  e^(decay_(j+1)m + ... + decay_im)``.

    ``products [..., C, C]``, ``write [..., C, M]``, ``decay [..., C, M]``, C a power of two.  The exponential is split between
    the right half of a block and its left half at the block's middle, where both factors are at most 1, as in
    :mod:`limbeck.ops.channel_decay`.  Returns ``(sums, since, until)``, ``[..., C, M]`` each: with the sums of the log decays up
    to and including a token, and of those after it.  What stands above the diagonal of ``products`` is not read.
    """
    lead, size = write.shape[:-2], write.shape[-2]
    products, write, decay = (x.flatten(0, len(lead) - 1) for x in (products, write, decay))
    sums = products.diagonal(dim1=1, dim2=2)[..., None] * write
    since = decay[:, :, None]
    until = torch.zeros_like(since)
    half = 1
    while half < size:
        # N chunks, b blocks of two halves, h tokens a half.
        left_since, right_since = since.unflatten(1, (-1, 2)).unbind(2)
        left_until, right_until = until.unflatten(1, (-1, 2)).unbind(2)
        blocks_NhhbX = products.unflatten(2, (-1, 2, half)).unflatten(1, (-1, 2, half))[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3)
        early_NbhM = write.unflatten(1, (-1, 2, half))[:, :, 0] * left_until.clamp_min(FLOOR).exp()
        late_NbhM = (blocks_NhhbX.movedim(-1, 1) @ early_NbhM) * right_since.clamp_min(FLOOR).exp()
        sums = sums + torch.stack([torch.zeros_like(late_NbhM), late_NbhM], 2).flatten(1, 3)
        since, until = (
            torch.cat([left_since, right_since + left_since[:, :, -1:]], 2),
            torch.cat([left_until + right_since[:, :, -1:], right_until], 2),
        )
        half *= 2
    return sums.unflatten(0, lead), since[:, 0].unflatten(0, lead), until[:, 0].unflatten(0, lead)


def gated_slot_attention_step(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, g_BHM: Tensor, state: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token: ``(o_BHV, new_state)``, computed in the dtype of ``state [B, H, M, K + V]``."""
    scale = k_BHK.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, g = (x.to(state.dtype) for x in (q_BHK, k_BHK, v_BHV, g_BHM))
    state = state * g.exp()[..., None] - torch.expm1(g)[..., None] * torch.cat([k, v], -1)[..., None, :]
    keys, values = state.split([k.shape[-1], v.shape[-1]], -1)
    weights_BHM = ((keys * q[..., None, :]).sum(-1) * scale).softmax(-1)
    return (values * weights_BHM[..., None]).sum(-2).to(v_BHV.dtype), state
