"""PaTH (arXiv 2505.16381): softmax attention whose positions are products of data-dependent Householder-like matrices.

    score_ij = scale * q_i^T H_i H_(i-1) ... H_(j+1) k_j          H_t = I - beta_t w_t w_t^T,  |w_t| = 1,  beta_t in [0, 2]

In a block of C tokens the products have the compact form of the delta rule: with ``L = tril(W W^T, -1)`` and
``U = (I + diag(beta) L)^-1 diag(beta)``

    H_i ... H_1        q -> q - tril(Q W^T) U W                 queries carried back to before the block
    H_C ... H_(j+1)    k -> k - (U tril(W K^T, -1))^T W         keys carried on to its end
    within the block   tril(Q K^T) - tril(Q W^T) U tril(W K^T, -1)
    H_C ... H_1        P = I - W^T U W

Queries then walk back one block at a time, all blocks at once: after d steps a block meets the one d before it.  Cost and memory are
those of attention that keeps its scores, ``T^2``; the loop has ``T / C`` steps.

Shape legend: B rows, T tokens, J key/value heads, G query heads a key/value head, K width, V value width, C tokens a block, n blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.ops.channel_decay import common_dtype


class PathKeys(NamedTuple):
    """What later queries see: keys carried on to the last token, values, and where they stand."""

    k: Tensor
    """``[B, S, J, K]``"""
    v: Tensor
    """``[B, S, J, V]``"""
    position: Tensor
    """Position in the document, int64 ``[B, S]``, -1 for padding."""
    document: Tensor
    """Number of the document ``[B, S]``."""


def path_attention(
    q_BTJGK: Tensor,
    w_BTJK: Tensor,
    beta_BTJ: Tensor,
    new: PathKeys,
    past: PathKeys | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """``(o_BTJGV, keys [B, S + T, J, K])``: outputs in the dtype of the values; past and new keys carried on to the last token.

    ``beta`` must be 0 at padding.  A query sees keys of its own document, at most ``window - 1`` positions back; at padding it sees
    itself.  Scores are computed in fp64 when q or k is and otherwise in fp32, as are the keys returned.
    """
    dtype = common_dtype(q_BTJGK, new.k)
    num_tokens = q_BTJGK.shape[1]
    size = min(chunk, num_tokens)
    with torch.autocast(q_BTJGK.device.type, enabled=False):
        q, k, w, beta = (_blocks(x.to(dtype), size) for x in (q_BTJGK, new.k, w_BTJK, beta_BTJ))
        v, (position, document) = _blocks(new.v.to(dtype), size), (_blocks(x, size, -1) for x in (new.position, new.document))
        q = q.movedim(-2, -3)
        system = torch.eye(size, dtype=dtype, device=w.device) + beta[..., None] * (w @ w.mT).tril(-1)
        u_CC = torch.linalg.solve_triangular(system, torch.diag_embed(beta), upper=False, unitriangular=True)
        read_GCC = (q @ w.mT.unsqueeze(-3)).tril() @ u_CC.unsqueeze(-3)
        carry_CC = (w @ k.mT).tril(-1)
        own = q @ k.mT.unsqueeze(-3) - read_GCC @ carry_CC.unsqueeze(-3)
        walking = q - read_GCC @ w.unsqueeze(-3)
        carried = k - (u_CC @ carry_CC).mT @ w
        through_KK = torch.eye(k.shape[-1], dtype=dtype, device=k.device) - w.mT @ u_CC @ w

        places = (position, document)
        diagonal = torch.eye(size, dtype=torch.bool, device=q.device)
        causal = torch.ones_like(diagonal).tril()
        visible = _visible(places, places, window) & causal | diagonal
        blocks, values, entered = [_masked(own * scale, visible, softcap)], [v], []
        count = q.shape[0]
        for back in range(1, count + 1):
            # Here `walking` holds the blocks from `back - 1` on, carried back to before the block `back - 1` earlier.
            entered.append(walking[0])
            if back == count:
                break
            earlier = slice(0, count - back)
            walking = walking[1:]
            scores = walking @ carried[earlier].mT.unsqueeze(-3) * scale
            seen = _visible(tuple(x[back:] for x in places), tuple(x[earlier] for x in places), window)
            blocks.append(_ahead(_masked(scores, seen, softcap), back, -torch.inf))
            values.append(_ahead(v[earlier], back, 0.0))
            walking = walking @ through_KK[earlier].unsqueeze(-3)
        if past is not None:
            theirs = past.k.to(dtype).transpose(1, 2), past.v.to(dtype).transpose(1, 2)
            scores = torch.stack(entered) @ theirs[0].mT.unsqueeze(-3) * scale
            blocks.append(_masked(scores, _visible(places, (past.position[None], past.document[None]), window), softcap))
            values.append(theirs[1].expand(count, *theirs[1].shape))
        weights = torch.cat(blocks, -1).softmax(-1)
        parts = zip(weights.split([x.shape[-1] for x in blocks], -1), values, strict=True)
        out = torch.stack([part @ value.unsqueeze(-3) for part, value in parts]).sum(0)
        keys = _carried_on(carried, through_KK, None if past is None else past.k.to(dtype).transpose(1, 2))
        real = keys.shape[-2] - (-num_tokens % size)
        out_BTJGV = out.movedim(-3, -2).transpose(2, 3).movedim(0, 1).flatten(1, 2)[:, :num_tokens]
    return out_BTJGV.to(new.v.dtype), keys[..., :real, :].transpose(1, 2)


def _blocks(x: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """``[B, T, J, ...] -> [n, B, J, C, ...]``, and ``[B, T] -> [n, B, C]``."""
    tail = -x.shape[1] % size
    x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, tail), value=fill).unflatten(1, (-1, size)).movedim(1, 0)
    return x if x.ndim == 3 else x.transpose(2, 3)


def _ahead(x: Tensor, count: int, fill: float) -> Tensor:
    """``count`` blocks of ``fill`` before the blocks of ``x``: they have no block so far back."""
    return torch.cat([x.new_full((count, *x.shape[1:]), fill), x])


def _visible(queries: tuple[Tensor, ...], keys: tuple[Tensor, ...], window: int | None) -> Tensor:
    """Which keys are of a query's document, real and near enough; ``[n, B, C]`` and ``[n, B, S]`` to ``[n, B, 1, 1, C, S]``."""
    (position_q, document_q), (position_k, document_k) = ([x[..., None] for x in queries], [x[..., None, :] for x in keys])
    seen = (document_q == document_k) & (position_k >= 0)
    if window is not None:
        seen = seen & (position_q - position_k < window)
    return seen[:, :, None, None]


def _masked(scores: Tensor, visible: Tensor, softcap: float | None) -> Tensor:
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~visible, -torch.inf)


def _carried_on(carried: Tensor, through: Tensor, past_BJSK: Tensor | None) -> Tensor:
    """Keys of all blocks ``[n, B, J, C, K]``, and the past's, carried on to the end of the last block: ``[B, J, S + n C, K]``."""
    keys = carried.new_zeros(*carried.shape[1:3], 0, carried.shape[-1]) if past_BJSK is None else past_BJSK
    for block, product in zip(carried, through, strict=True):
        keys = torch.cat([keys @ product.mT, block], -2)
    return keys
