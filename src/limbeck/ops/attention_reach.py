"""How far softmax attention looks back, and the least-squares scale of each head of a sum.

Both are sums over queries: they add up over micro-batches and divide once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.ops.packing import document_segments


class Reach(NamedTuple):
    """Sums over queries, fp64; ``+`` adds two of them up."""

    distance_H: Tensor
    """Of the mean distance ``sum_j w_ij (i - j)``, in tokens."""
    queries: Tensor
    """Number of queries, a scalar."""

    def plus(self, other: Reach) -> Reach:
        """The sums over the queries of both."""
        return Reach(*(a + b for a, b in zip(self, other, strict=True)))

    def mean(self) -> Tensor:
        """Mean distance in tokens ``[H]``; zeros where there are no queries."""
        return self.distance_H / self.queries.clamp_min(1)


def attention_reach(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    documents_BT: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
    block: int = 128,
) -> Reach:
    """Measure the weights ``softmax_j(scaling * q_i . k_j)`` over the keys that a query sees: those of its document up to itself,
    and of the last ``window`` tokens.

    Args:
        q_BHTK: queries, rotated; ``k_BGTK`` keys of ``G`` heads, each for ``H / G`` query heads that follow each other.
        documents_BT: number of every token's document, -1 on padding; documents lie one after another.
        softcap: ``c * tanh(scores / c)`` before the softmax.
        block: queries at a time: scores are ``[B, H, block, T]``.

    The mean distance sets forget rates in Taylor-Calibrate (arXiv 2606.16429): a memory of half-life ``d`` for a head that looks
    ``d`` tokens back.
    """
    heads, num_tokens = q_BHTK.shape[1], q_BHTK.shape[2]
    k_BHTK = k_BGTK.repeat_interleave(heads // k_BGTK.shape[1], dim=1)
    real_BT, segments_BT = document_segments(documents_BT)
    steps_T = torch.arange(num_tokens, device=q_BHTK.device)
    total: Reach | None = None
    for start in range(0, num_tokens, block):
        end = min(start + block, num_tokens)
        distance_QS = steps_T[start:end, None] - steps_T[:end]
        visible_BQS = (segments_BT[:, start:end, None] == segments_BT[:, None, :end]) & (distance_QS >= 0) & real_BT[:, None, :end]
        if window is not None:
            visible_BQS = visible_BQS & (distance_QS < window)
        scores_BHQS = q_BHTK[:, :, start:end] @ k_BHTK[:, :, :end].mT * scaling
        part = _of_scores(scores_BHQS, visible_BQS, distance_QS, real_BT[:, start:end], softcap)
        total = part if total is None else total.plus(part)
    assert total is not None
    return total


def _of_scores(scores_BHQS: Tensor, visible_BQS: Tensor, distance_QS: Tensor, real_BQ: Tensor, softcap: float | None) -> Reach:
    if softcap is not None:
        scores_BHQS = softcap * torch.tanh(scores_BHQS / softcap)
    wide = scores_BHQS.to(torch.promote_types(scores_BHQS.dtype, torch.float32))
    # The lowest finite number and not -inf: a query on padding sees nothing, and its row must not be NaN.
    weights = wide.masked_fill(~visible_BQS[:, None], torch.finfo(wide.dtype).min).softmax(-1)
    distance_BHQ = (weights * distance_QS).sum(-1)
    return Reach(
        torch.where(real_BQ[:, None], distance_BHQ, 0).sum((0, 2), dtype=torch.float64),
        real_BQ.sum(),
    )


def head_products(heads_NQ: Tensor, weight_DQ: Tensor, target_ND: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """The normal equations of ``target = sum_h s_h (heads_h @ weight_h^T)``: ``gram_HH`` and ``cross_H``, fp64.

    They add up over tokens ``N``.  ``Q`` = H * head width; nothing of shape ``[N, H, D]`` is made.
    """
    blocks = (num_heads, heads_NQ.shape[1] // num_heads)
    gram_QQ = (heads_NQ.mT @ heads_NQ) * (weight_DQ.mT @ weight_DQ)
    gram_HH = gram_QQ.unflatten(0, blocks).unflatten(2, blocks).sum((1, 3), dtype=torch.float64)
    cross_H = (heads_NQ * (target_ND @ weight_DQ)).unflatten(1, blocks).sum((0, 2), dtype=torch.float64)
    return gram_HH, cross_H


def bounded_gains(gram_HH: Tensor, cross_H: Tensor, bounds: tuple[float, float], sweeps: int = 1000) -> Tensor:
    """The scales ``s_H`` within ``bounds`` of the least squared error ``s^T gram s - 2 cross^T s``, fp64.

    Cyclic coordinate descent from 1, each step exact within the bounds: no step raises the error, so the result is never worse than
    leaving every head as it is (where the bounds allow that).  A head that is always silent keeps 1.
    """
    gains_H = torch.ones_like(cross_H)
    for _ in range(sweeps):
        before_H = gains_H.clone()
        for h, power in enumerate(gram_HH.diagonal().tolist()):
            if power > 0:
                wanted = gains_H[h] + (cross_H[h] - gram_HH[h] @ gains_H) / power
                gains_H[h] = wanted.clamp(*bounds)
        if torch.allclose(gains_H, before_H, rtol=1e-9, atol=0):
            break
    return gains_H
