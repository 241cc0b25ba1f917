"""Reverse KL and JSD against a teacher of which the hidden states and the head are here; forward KL is ``linear_kl``.

With ``p`` the student's and ``t`` the teacher's tempered probabilities and ``M = (1 - b) p + b t``:

    reverse KL = sum p log(p / t)                              gradient  p (log(p / t) - reverse KL)
    JSD(b)     = b KL(t || M) + (1 - b) KL(p || M)             gradient  (1 - b) p (log(p / M) - KL(p || M))

with respect to the tempered logits (in JSD's the terms through ``M`` cancel).  ``M`` and the weights are those of TRL and of
Liger: ``b = 0.5`` is the Jensen-Shannon divergence, and the divergence vanishes at both ends.

Shape legend: N tokens, n tokens that count, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.ops.fused import FusedMetrics, against_teacher
from limbeck.ops.projection import exponentiate
from limbeck.types import Head


def linear_reverse_kl(
    student_ND: Tensor,
    student_head: Head,
    teacher_ND: Tensor,
    teacher_head: Head,
    mask_N: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, FusedMetrics]:
    """``T^2 * sum KL(student || teacher)`` in nats; arguments, gradients and errors as in :func:`~limbeck.ops.fused.linear_kl`."""

    def reverse_kl(logits_nV: Tensor, expected_nV: Tensor) -> Tensor:
        _log_softmax(expected_nV)
        _log_softmax(logits_nV)
        student_nV = logits_nV.exp()
        ratio_nV = logits_nV.sub_(expected_nV)
        kl_n1 = torch.mul(student_nV, ratio_nV, out=expected_nV).sum(1, keepdim=True)
        ratio_nV.sub_(kl_n1).mul_(student_nV)
        return kl_n1.squeeze(1)

    return against_teacher(student_ND, student_head, teacher_ND, teacher_head, mask_N, reverse_kl, temperature, chunk)


def linear_jsd(
    student_ND: Tensor,
    student_head: Head,
    teacher_ND: Tensor,
    teacher_head: Head,
    mask_N: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, FusedMetrics]:
    """``T^2 * sum JSD_beta`` in nats, ``0 < beta < 1``; the rest is as in :func:`~limbeck.ops.fused.linear_kl`.

    Five buffers of ``[chunk, V]``.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}: above 0 and below 1 (the limits of JSD / beta are linear_kl and linear_reverse_kl)")

    def jsd(logits_nV: Tensor, expected_nV: Tensor) -> Tensor:
        teacher_nV, student_nV = expected_nV.clone(), logits_nV.clone()
        expected_nV.sub_(exponentiate(teacher_nV).log())
        logits_nV.sub_(exponentiate(student_nV).log())
        # Where both underflow M does too, and log M must stay finite: what it is multiplied by there is 0.
        mixture_nV = torch.lerp(student_nV, teacher_nV, beta).clamp_min_(torch.finfo(student_nV.dtype).tiny).log_()
        teacher_kl_n1 = expected_nV.sub_(mixture_nV).mul_(teacher_nV).sum(1, keepdim=True)
        ratio_nV = logits_nV.sub_(mixture_nV)
        student_kl_n1 = torch.mul(student_nV, ratio_nV, out=mixture_nV).sum(1, keepdim=True)
        ratio_nV.sub_(student_kl_n1).mul_(student_nV.mul_(1 - beta))
        return (beta * teacher_kl_n1 + (1 - beta) * student_kl_n1).squeeze(1)

    return against_teacher(student_ND, student_head, teacher_ND, teacher_head, mask_N, jsd, temperature, chunk)


def _log_softmax(shifted_nV: Tensor) -> None:
    """Logits with maximum 0 -> log-probabilities, in place."""
    shifted_nV.sub_(shifted_nV.exp().sum(1, keepdim=True).log_())
