"""Scores of a chunk whose memory forgets every channel at a rate of its own.

    P_ij = sum_c  row_ic  key_jc  e^(g_(j+1)c + ... + g_ic)      j <= i

Splitting the exponential into one factor for ``i`` and one for ``j`` turns this into a matrix product, and the factor of ``j`` into
``e^-(sum of g)``, which overflows after a few strongly decayed tokens.  So the split is made at a point *between* the two: tokens of the
right half of a block meet those of its left half at the middle, where both factors are at most 1, and what is left are two blocks of
half the size.  log2(C) rounds of batched products; each needs only sums of log decays (never differences, which lose
the small next to the large) and is exact however strong the decay.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.ops.chunks import FLOOR, ChunkMasks, chunk_masks, to_chunks
from limbeck.ops.packing import document_segments


class ChunkedRows(NamedTuple):
    """What the recurrences with per-channel decays start from; K the key width, W = K or 1 the width of the decay."""

    rows: Tensor
    """``[c, B, H, R, C, K]``: q, and what else is multiplied by the keys."""
    keys: Tensor
    """``[c, B, H, C, K]``, zero at padding."""
    scores: Tensor
    """``[c, B, H, R, C, C]``: decayed products of rows and keys, zero above the diagonal, across documents and at padding."""
    enter: Tensor
    """``[c, B, H, C, W]``: what is left of the entering state at this token."""
    leave: Tensor
    """``[c, B, H, C, W]``: what is left at the chunk's end of what this token writes."""
    survive: Tensor
    """``[c, B, H, W, 1]``: what is left of the entering state at the chunk's end."""


def chunked_rows(rows_RBTHK: tuple[Tensor, ...], k_BTHK: Tensor, g: Tensor, documents_BT: Tensor | None, size: int) -> ChunkedRows:
    """Cut into chunks of ``size`` (a power of two), in one floating dtype: k, and R tensors of its shape; ``g`` is ``[B, T, H]``
    or ``[B, T, H, K]``."""
    g_BTHW = g[..., None] if g.ndim == k_BTHK.ndim - 1 else g
    real_BT = segments_BT = None
    if documents_BT is not None:
        real_BT, segments_BT = document_segments(documents_BT)
        real = real_BT[..., None, None]
        g_BTHW, k_BTHK = torch.where(real, g_BTHW, 0), torch.where(real, k_BTHK, 0)
    masks = chunk_masks(segments_BT, real_BT, size, k_BTHK.device)
    decay, keys = to_chunks(g_BTHW, size), to_chunks(k_BTHK, size)
    rows = torch.stack([to_chunks(x, size) for x in rows_RBTHK], 3)
    scores, since, until = _scores(rows, keys, decay)
    return _masked(ChunkedRows(rows, keys, scores, since, until, since[..., -1, :, None]), masks)


def _masked(made: ChunkedRows, masks: ChunkMasks) -> ChunkedRows:
    """Exponentials of the sums, and zeros where packing separates."""
    enter, leave, survive = (x.clamp_min(FLOOR).exp() for x in made[3:])
    zero = enter.new_zeros(())
    return made._replace(
        scores=torch.where(masks.reads.unsqueeze(-3), made.scores, zero),
        enter=torch.where(masks.enters[..., None], enter, zero),
        leave=torch.where(masks.stays[..., None], leave, zero),
        survive=torch.where(masks.survives[..., None], survive, zero),
    )


def _scores(rows: Tensor, keys: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decayed products ``[..., R, C, C]`` and the sums of log decays from the chunk's start and to its end ``[..., C, W]``."""
    if decay.shape[-1] == keys.shape[-1]:
        return decayed_scores(rows, keys, decay)
    # One rate for all channels comes out of the sum.
    ones = torch.ones_like(decay)
    ratio, since, until = decayed_scores(ones.unsqueeze(-3), ones, decay)
    return (rows @ keys.unsqueeze(-3).mT) * ratio, since, until


def decayed_scores(rows: Tensor, keys: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``P`` of the module's first lines for ``rows [..., R, C, K]``, ``keys [..., C, K]`` and log ``decay [..., C, K]`` (down to
    -inf), C a power of two.

    Returns ``(scores [..., R, C, C], since [..., C, K], until [..., C, K])``: zeros above the diagonal, the sum of the log decays up to
    and including a token, and of those after it.  Gradients flow to all three inputs, from all three outputs.
    """
    lead = keys.shape[:-2]
    made = _DecayedScores.apply(*(x.flatten(0, len(lead) - 1) for x in (rows, keys, decay)))
    scores, since, until = (x.unflatten(0, lead) for x in made)
    return scores, since, until


class _Round(NamedTuple):
    """Factors, at most 1, of a round over b blocks of two halves of h tokens: both are towards the middle, ``[N, b, h, K]``."""

    late: Tensor
    early: Tensor


def _rounds(decay: Tensor) -> tuple[list[_Round], Tensor, Tensor]:
    """The rounds for log decays ``[N, C, K]``, and the sums ``since`` and ``until`` over the whole chunk."""
    since, rounds = decay[:, :, None], []
    until = torch.zeros_like(since)
    while since.shape[1] > 1:
        left_since, right_since = since.unflatten(1, (-1, 2)).unbind(2)
        left_until, right_until = until.unflatten(1, (-1, 2)).unbind(2)
        rounds.append(_Round(right_since.clamp_min(FLOOR).exp(), left_until.clamp_min(FLOOR).exp()))
        since = torch.cat([left_since, right_since + left_since[:, :, -1:]], 2)
        until = torch.cat([left_until + right_since[:, :, -1:], right_until], 2)
    return rounds, since[:, 0], until[:, 0]


def _corners(x_NRCC: Tensor, half: int) -> Tensor:
    """A view of where the right halves' tokens meet the left halves', ``[N, b, R, h, h]``."""
    blocks = x_NRCC.unflatten(3, (-1, 2, half)).unflatten(2, (-1, 2, half))
    return blocks[:, :, :, 1, :, :, 0].diagonal(0, 2, 4).movedim(-1, 1)


def _late(x_NRCK: Tensor, half: int) -> Tensor:
    """A view of the right halves' rows ``[N, b, R, h, K]``."""
    return x_NRCK.unflatten(2, (-1, 2, half))[:, :, :, 1].transpose(1, 2)


def _early(x_NCK: Tensor, half: int) -> Tensor:
    """A view of the left halves' keys ``[N, b, h, K]``."""
    return x_NCK.unflatten(1, (-1, 2, half))[:, :, 0]


class _DecayedScores(torch.autograd.Function):
    """Saves its inputs alone: the factors of the rounds, each as large as the keys, are made again in the backward pass.

    A log decay stands in the exponents of all pairs that it lies between, so its gradient is a sum over later rows of ``row . drow``
    less one over later keys of ``key . dkey``.  The diagonal, which no decay touches, is kept out of both.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, keys: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(rows, keys, decay)
        num, num_rows, size, _ = rows.shape
        rounds, since, until = _rounds(decay)
        scores = torch.zeros(num, num_rows, size, size, dtype=rows.dtype, device=rows.device)
        scores.diagonal(dim1=2, dim2=3).copy_((rows * keys[:, None]).sum(-1))
        for number, (late, early) in enumerate(rounds):
            half = 1 << number
            right = (_late(rows, half) * late[:, :, None]).flatten(2, 3)
            corners = right @ (_early(keys, half) * early).mT
            _corners(scores, half).copy_(corners.unflatten(2, (num_rows, half)))
        return scores, since.contiguous(), until.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dscores: Tensor, dsince: Tensor, duntil: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, keys, decay = ctx.saved_tensors
        num_rows, size = rows.shape[1:3]
        drows, dkeys = torch.zeros_like(rows), torch.zeros_like(keys)
        for number, (late, early) in enumerate(_rounds(decay)[0]):
            half = 1 << number
            dcorners = _corners(dscores, half).flatten(2, 3)
            right = (_late(rows, half) * late[:, :, None]).flatten(2, 3)
            dright = (dcorners @ (_early(keys, half) * early)).unflatten(2, (num_rows, half))
            _late(drows, half).addcmul_(dright, late[:, :, None])
            _early(dkeys, half).addcmul_(dcorners.mT @ right, early)
        after = torch.ones(size, size, dtype=decay.dtype, device=decay.device).triu()
        ddecay = after @ ((rows * drows).sum(1) - keys * dkeys + dsince) + after.mT.tril(-1) @ duntil
        own = dscores.diagonal(dim1=2, dim2=3)[..., None]
        return drows.addcmul_(own, keys[:, None]), dkeys.add_((own * rows).sum(1)), ddecay


def common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 when any of the ``tensors`` (of any shape) is, else fp32: what the chunked recurrences compute in."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32
