"""How the tokens of a document stand to each other, and how far two networks differ in that (MiniLMv2, Wang et al., arXiv 2012.15828)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 256
"""Rows of relations that exist at one time."""


def relation_divergence(
    student_BTW: Tensor,
    teacher_BTU: Tensor,
    documents_BT: Tensor,
    *,
    heads: int,
    temperature: float = 1.0,
    causal: bool = True,
    chunk: int | None = None,
) -> Tensor:
    """``KL(teacher || student)`` of each token's relations, summed over real tokens and averaged over ``heads``; a scalar.

    Both states are regrouped to ``heads`` parts of their widths W and U, which may differ; rows are L2-normalised, and the relations of
    token t are ``softmax_j(a_t . a_j / temperature)`` over the tokens j of its document (``documents_BT``, -1 on padding), up to t itself
    with ``causal``.  ``chunk`` rows of the ``[B, heads, T, T]`` exist at one time; the backward pass computes them again.
    """
    wide = torch.promote_types(student_BTW.dtype, torch.float32)
    student, teacher = (regrouped(x.to(wide), heads) for x in (student_BTW, teacher_BTU.detach()))
    total = student.new_zeros(())
    step, length = chunk or CHUNK, documents_BT.shape[1]
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        seen = slice(0, rows.stop if causal else length)
        parts = (student[:, :, rows], student[:, :, seen], teacher[:, :, rows], teacher[:, :, seen], _related(documents_BT, rows, seen, causal))
        total = total + checkpoint(_rows_divergence, *parts, temperature, use_reentrant=False, preserve_rng_state=False)
    return total / heads


def regrouped(x_BTW: Tensor, heads: int) -> Tensor:
    """Tokens W wide as ``[B, heads, T, W / heads]``, each row of length 1 (a row of zeros stays one)."""
    return F.normalize(x_BTW.unflatten(-1, (heads, -1)).transpose(1, 2), dim=-1)


def _related(documents_BT: Tensor, rows: slice, seen: slice, causal: bool) -> Tensor:
    """Which tokens each row is related to, bool ``[B, rows, seen]``; nothing on padding."""
    mine, theirs = documents_BT[:, rows, None], documents_BT[:, None, seen]
    related = (mine == theirs) & (mine >= 0)
    if not causal:
        return related
    index = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    return related & (index[rows, None] >= index[None, seen])


def _rows_divergence(student: Tensor, student_all: Tensor, teacher: Tensor, teacher_all: Tensor, related: Tensor, temperature: float) -> Tensor:
    related = related.unsqueeze(1)
    ours, theirs = (
        # A row without relations is even everywhere, in both: its divergence is zero and so is its gradient.
        (x @ y.mT / temperature).masked_fill(~related, torch.finfo(x.dtype).min).log_softmax(-1)
        for x, y in ((student, student_all), (teacher, teacher_all))
    )
    difference = (theirs - ours).masked_fill(~related, 0)
    return (theirs.exp() * difference).sum()
