"""Output projection and loss in one: losses on ``[tokens, vocabulary]`` that never hold it.

Only the rows that count are projected, a chunk at a time.  A softmax loss's gradient with respect to its logits is known as
soon as the logits are (``p - t`` for cross-entropy and forward KL), so it is formed in place in the forward pass, multiplied
by the head there, and kept as ``[tokens, D]``; the backward pass only scales.  A frozen head costs no gradient of its own.
Sums and softmax are fp32 (fp64 for fp64 inputs) whatever the products are computed in.  A loss is a :data:`Target`;
:func:`fused` walks the chunks.  The other divergences are in :mod:`~limbeck.ops.divergences` and
:mod:`~limbeck.ops.topk_divergence`.

Shape legend: N tokens, n tokens that count, D width, V vocabulary, K kept ids, C columns (V, or K ids of each row's own).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.errors import DataError
from limbeck.ops.projection import (
    Projection,
    chunk_for,
    common_vocabulary,
    exponentiate,
    logits_of,
    project_with,
    shift,
    whole_head,
)
from limbeck.types import IGNORE, Head


@dataclass(frozen=True)
class FusedMetrics:
    """What the chunks give for free: ``agreement``, ``count`` and ``kl`` are detached scalars, sums over ``count`` tokens."""

    agreement: Tensor
    """Tokens at which the student's likeliest id is the teacher's (for cross-entropy: the label)."""
    count: Tensor
    """Tokens that counted."""
    kl: Tensor
    """The divergence in nats, at the loss's temperature without T squared (KL for KL; for cross-entropy the loss)."""


def linear_cross_entropy(
    hidden_ND: Tensor, head: Head, labels_N: Tensor, *, chunk: int | None = None
) -> tuple[Tensor, FusedMetrics]:
    """Summed next-token cross-entropy in nats over the rows whose label is not ``IGNORE``.

    ``chunk`` is the number of tokens whose logits exist at one time (None: by the device).  Gradients flow to the hidden
    states, the head's weight and bias. A label that the head does not have raises :class:`DataError`.
    """
    rows_n = (labels_N != IGNORE).nonzero().squeeze(1)
    labels_n = labels_N[rows_n]
    width, mask_V = common_vocabulary([head])
    known_n = (labels_n >= 0) & (labels_n < width)
    if mask_V is not None:
        known_n &= mask_V[labels_n.clamp(0, width - 1)]
    if not bool(known_n.all()):
        wrong = labels_n[~known_n][:5].tolist()
        raise DataError(
            f"labels: token ids {wrong} are not in the model's vocabulary of {width}; the data come from another tokenizer: "
            f"prepare it with the student's own, or mark what does not count with {IGNORE}"
        )

    def target(logits_nV: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        labels = labels_n[part, None]
        guesses = shift(logits_nV)
        picked = logits_nV.gather(1, labels)
        total = exponentiate(logits_nV)
        logits_nV.scatter_add_(1, labels, torch.full_like(picked, -1))
        return (total.log() - picked).squeeze(1), guesses == labels.squeeze(1)

    loss, (ce, agreement) = fused(hidden_ND, head, rows_n, target, 1.0, width, mask_V, chunk)
    return loss, FusedMetrics(agreement, torch.tensor(rows_n.numel(), device=rows_n.device), ce)


def linear_kl(
    student_ND: Tensor,
    student_head: Head,
    teacher_ND: Tensor,
    teacher_head: Head,
    mask_N: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, FusedMetrics]:
    """``T^2 * sum KL(teacher || student)`` in nats over the rows where ``mask_N`` is True, both tempered by ``T``.

    ``chunk`` is the number of tokens whose logits exist at one time (None: by the device; three buffers of ``[chunk, V]``).
    Gradients flow to the student's hidden states, weight and bias, never to the teacher.  The vocabularies may be padded to
    different widths: ids masked on either side have no probability on both, and an id that only one head has must be masked,
    else :class:`ModelError`.
    """

    def forward_kl(logits_nV: Tensor, expected_nV: Tensor) -> Tensor:
        teacher_nV = expected_nV.clone()
        teacher_total = exponentiate(teacher_nV)
        gap = expected_nV.sub_(logits_nV).mul_(teacher_nV).sum(1, keepdim=True)
        total = exponentiate(logits_nV)
        logits_nV.sub_(teacher_nV)
        return (gap - teacher_total.log() + total.log()).squeeze(1)

    return against_teacher(student_ND, student_head, teacher_ND, teacher_head, mask_N, forward_kl, temperature, chunk)


def against_teacher(
    student_ND: Tensor,
    student_head: Head,
    teacher_ND: Tensor,
    teacher_head: Head,
    mask_N: Tensor,
    divergence: Callable[[Tensor, Tensor], Tensor],
    temperature: float,
    chunk: int | None,
) -> tuple[Tensor, FusedMetrics]:
    """``T^2 * sum divergence`` over the rows of a mask; the arguments are those of :func:`linear_kl`.

    ``divergence(logits_nV, expected_nV)`` gets both sides' tempered logits with maximum 0, gives nats per row, turns the first
    into the gradient with respect to it in place and may use the second up.
    """
    rows_n = mask_N.nonzero().squeeze(1)
    width, mask_V = common_vocabulary([student_head, teacher_head])
    teacher = project_with(teacher_ND, whole_head(teacher_head), width, mask_V, temperature)

    def target(logits_nV: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        expected_nV, _ = logits_of(teacher_ND.detach()[rows_n[part]], teacher)
        # Sums of both sides have one dtype: that of the wider.
        expected_nV = expected_nV.to(logits_nV.dtype)
        agree = shift(logits_nV) == shift(expected_nV)
        return divergence(logits_nV, expected_nV), agree

    loss, (kl, agreement) = fused(student_ND, student_head, rows_n, target, temperature, width, mask_V, chunk)
    return loss, FusedMetrics(agreement, torch.tensor(rows_n.numel(), device=rows_n.device), kl)


Target = Callable[[Tensor, slice], tuple[Tensor, ...]]
"""``(logits_nC, rows) -> (loss per row in nats, other measures per row ...)``; turns the tempered logits into the gradient of
the loss with respect to them, in place."""


def fused(
    hidden_ND: Tensor,
    head: Head,
    rows_n: Tensor,
    target: Target,
    temperature: float,
    width: int,
    mask_V: Tensor | None,
    chunk: int | None,
    ids_nK: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``(T^2 * summed loss, detached sums of what the target measures)``, the loss itself (without T squared) being the first.

    ``width`` and ``mask_V`` are those of :func:`common_vocabulary`.  With ``ids_nK`` row ``i`` has logits for its own K ids
    only, and costs ``K * D`` products in place of ``V * D``.
    """
    head = whole_head(head)
    projection = project_with(hidden_ND, head, width, mask_V, temperature)
    chunk = chunk or chunk_for(hidden_ND.device)
    # Asked here: inside the function grad mode is always off.
    wants = torch.is_grad_enabled()
    loss, *sums = _FusedLoss.apply(hidden_ND, head.weight_VD, head.bias_V, projection, rows_n, ids_nK, target, chunk, wants)
    return loss, tuple(sums)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        projection: Projection,
        rows_n: Tensor,
        ids_nK: Tensor | None,
        target: Target,
        chunk: int,
        wants: bool,
    ) -> tuple[Tensor, ...]:
        accumulate, temperature = projection.accumulate, projection.temperature
        width, dtype = projection.weight_VD.shape[0], projection.weight_VD.dtype
        wants_hidden, wants_weight, wants_bias = (wants and needed for needed in ctx.needs_input_grad[:3])

        def zeros(like: Tensor, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=accumulate, device=like.device)

        dhidden = hidden_ND.new_empty(rows_n.numel(), hidden_ND.shape[1]) if wants_hidden else None
        dweight = zeros(weight_VD, *weight_VD.shape) if wants_weight else None
        dbias = zeros(weight_VD, weight_VD.shape[0]) if wants_bias else None
        measured: list[tuple[Tensor, ...]] = []
        with torch.autocast(hidden_ND.device.type, enabled=False):
            # No row at all is one empty chunk: the target is asked what it measures.
            for start in range(0, max(rows_n.numel(), 1), chunk):
                part = slice(start, start + chunk)
                hidden_nD = hidden_ND[rows_n[part]].to(dtype)
                ids = None if ids_nK is None else ids_nK[part]
                logits_nC, slope_nC = logits_of(hidden_nD, projection, ids)
                measured.append(target(logits_nC, part))
                if not (wants_hidden or wants_weight or wants_bias):
                    continue
                if slope_nC is not None:
                    logits_nC.mul_(slope_nC)
                # T^2 of the loss times 1/T of the tempering; the bias stands inside the scale too.
                if temperature * projection.scale != 1:
                    logits_nC.mul_(temperature * projection.scale)
                dlogits_nC = logits_nC.to(dtype)
                if ids is None:
                    if dbias is not None:
                        dbias[:width] += logits_nC.sum(0)
                    if dhidden is not None:
                        dhidden[part] = dlogits_nC @ projection.weight_VD
                    if dweight is not None and dtype == accumulate:
                        dweight[:width].addmm_(dlogits_nC.mT, hidden_nD)
                    elif dweight is not None:
                        dweight[:width] += dlogits_nC.mT @ hidden_nD
                else:
                    if dbias is not None:
                        dbias.index_add_(0, ids.flatten(), logits_nC.flatten())
                    if dhidden is not None:
                        dhidden[part] = torch.bmm(dlogits_nC[:, None], projection.weight_VD[ids]).squeeze(1)
                    if dweight is not None:
                        outer_nKD = (dlogits_nC[:, :, None] * hidden_nD[:, None]).to(accumulate)
                        dweight.index_add_(0, ids.flatten(), outer_nKD.flatten(0, 1))
        # One sum over all rows: it does not depend on where the chunks end.
        sums = tuple(torch.cat(parts).sum() for parts in zip(*measured, strict=True))
        ctx.shape = hidden_ND.shape
        ctx.dtypes = weight_VD.dtype, None if bias_V is None else bias_V.dtype
        ctx.save_for_backward(rows_n, dhidden, dweight, dbias)
        ctx.mark_non_differentiable(*sums)
        return sums[0] * temperature**2, *sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_dsums: Tensor) -> tuple[Tensor | None, ...]:
        rows_n, dhidden, dweight, dbias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        spread = None
        if dhidden is not None:
            spread = dhidden.new_zeros(ctx.shape).index_copy_(0, rows_n, (dhidden * dloss).to(dhidden.dtype))
        weight = None if dweight is None else _scaled(dweight, dloss, weight_dtype)
        bias = None if dbias is None else _scaled(dbias, dloss, bias_dtype)
        return spread, weight, bias, None, None, None, None, None, None


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``factor * x`` in another dtype, without a copy of the head in the wider one on the way."""
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))
