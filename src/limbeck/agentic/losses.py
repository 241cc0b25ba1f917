"""The divergence from a teacher's likeliest tokens, of logits that exist."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.errors import DataError
from limbeck.ops.topk_divergence import linear_topk_divergence
from limbeck.types import Head, TopKSignal

_CHUNK = 64
"""Tokens that go through the operator at one time."""


def top_k_kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor | TopKSignal, k: int = 128, *, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """KL(teacher || student) over the teacher's k likeliest tokens and, as one more category, the rest; mean nats a token.

    Neither side is renormalised over the k: what the teacher leaves to other tokens is a probability that the student has to match.  Never
    above the full KL, and equal to it where k is the vocabulary.  With a temperature the value carries its square.

    Args:
        student_logits: ``[..., V]``.
        teacher_logits: ``[..., V]``, or a signal whose rows count positions of the flattened student's.
        k: tokens kept; a signal that holds fewer gives those.
        mask: ``[...]``, True where a position counts; all by default.  A signal's rows say it themselves.

    Raises:
        DataError: shapes that do not fit each other, no position that counts, or a signal without the partition sum at this temperature.
    """
    signal = teacher_logits if isinstance(teacher_logits, TopKSignal) else signal_of(teacher_logits, k, mask, temperature)
    if isinstance(teacher_logits, TopKSignal) and mask is not None:
        raise DataError("mask: a signal's own rows say which positions count: give one of the two")
    if isinstance(teacher_logits, Tensor) and teacher_logits.shape[:-1] != student_logits.shape[:-1]:
        raise DataError(f"student_logits are {list(student_logits.shape)} and teacher_logits {list(teacher_logits.shape)}: all but the last must be equal")
    count = len(signal.rows_n)
    if not count:
        raise DataError("no position counts: the mask is False everywhere, or the signal is empty")
    logits_nV = student_logits.flatten(0, -2)[signal.rows_n]
    # The operator makes logits by a product with a head.  Of n tokens whose logits are there already, these are the head, and the identity
    # the states: 0 times anything must be 0.
    logits_nV = logits_nV.clamp_min(torch.finfo(logits_nV.dtype).min / 4)
    total = logits_nV.new_zeros(())
    with torch.autocast(logits_nV.device.type, enabled=False):
        for start in range(0, count, _CHUNK):
            part = logits_nV[start : start + _CHUNK]
            states = torch.eye(len(part), dtype=part.dtype, device=part.device)
            loss, _ = linear_topk_divergence(states, Head(part.T), rows_of(signal, start, len(part)), k=k, temperature=temperature)
            total = total + loss
    return total / count


@torch.no_grad()
def signal_of(logits: Tensor, k: int, mask: Tensor | None = None, temperature: float = 1.0) -> TopKSignal:
    """What a top-k teacher says of logits ``[..., V]`` at the positions of ``mask [...]`` (all by default)."""
    if mask is not None and mask.shape != logits.shape[:-1]:
        raise DataError(f"mask is {list(mask.shape)}, and the logits' positions are {list(logits.shape[:-1])}")
    flat_NV = logits.flatten(0, -2)
    rows_n = torch.arange(len(flat_NV), device=logits.device) if mask is None else mask.flatten().nonzero().flatten()
    wide_nV = flat_NV[rows_n].to(torch.promote_types(logits.dtype, torch.float32))
    top = wide_nV.topk(min(k, wide_nV.shape[-1]))
    return TopKSignal(rows_n, top.indices, top.values, (wide_nV / temperature).logsumexp(-1, keepdim=True), (temperature,))


def rows_of(signal: TopKSignal, start: int, count: int) -> TopKSignal:
    """Some of a signal's rows, numbered from 0."""
    part = slice(start, start + count)
    rows_n = torch.arange(count, device=signal.rows_n.device)
    return TopKSignal(rows_n, signal.ids_nK[part], signal.logits_nK[part], signal.log_z_nZ[part], signal.temperatures)
