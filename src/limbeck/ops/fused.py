"""Output projection and loss in one: cross-entropy and forward KL that never hold ``[tokens, vocabulary]``.

Only the rows that count are projected, a chunk at a time.  A softmax loss's gradient with respect to its logits is ``p -
t``, known as soon as the logits are, so it is formed in place in the forward pass, multiplied by the head there, and kept as
``[tokens, D]``; the backward pass only scales.  A frozen head costs no gradient of its own.  Sums and softmax are fp32 (fp64
for fp64 inputs) whatever the products are computed in.

Shape legend: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial

from limbeck.errors import DataError, ModelError
from limbeck.types import IGNORE, Head


@dataclass(frozen=True)
class FusedMetrics:
    """What the chunks give for free; detached scalars, sums over ``count`` tokens."""

    agreement: Tensor
    """Tokens at which the student's likeliest id is the teacher's (for cross-entropy: the label)."""
    count: Tensor
    """Tokens that counted."""
    kl: Tensor
    """KL from the target to the student in nats, at the loss's temperature without T squared; for cross-entropy the loss."""


def linear_cross_entropy(hidden_ND: Tensor, head: Head, labels_N: Tensor, *, chunk: int = 1024) -> tuple[Tensor, FusedMetrics]:
    """Summed next-token cross-entropy in nats over the rows whose label is not ``IGNORE``.

    ``chunk`` is the number of tokens whose logits exist at one time.  Gradients flow to the hidden states, the head's weight
    and bias. A label that the head does not have raises :class:`DataError`.
    """
    rows_n = (labels_N != IGNORE).nonzero().squeeze(1)
    labels_n = labels_N[rows_n]
    width, mask_V = _common_vocabulary([head])
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
        guesses = _shift(logits_nV)
        picked = logits_nV.gather(1, labels)
        total = _exponentiate(logits_nV)
        logits_nV.scatter_add_(1, labels, torch.full_like(picked, -1))
        return (total.log() - picked).squeeze(1), guesses == labels.squeeze(1)

    return _fused(hidden_ND, head, rows_n, target, 1.0, width, mask_V, chunk)


def linear_kl(
    student_ND: Tensor,
    student_head: Head,
    teacher_ND: Tensor,
    teacher_head: Head,
    mask_N: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> tuple[Tensor, FusedMetrics]:
    """``T^2 * sum KL(teacher || student)`` in nats over the rows where ``mask_N`` is True, both tempered by ``T``.

    ``chunk`` is the number of tokens whose logits exist at one time (three buffers of ``[chunk, V]``).  Gradients flow to
    the student's hidden states, weight and bias, never to the teacher.  The vocabularies may be padded to different widths:
    ids masked on either side have no probability on both, and an id that only one head has must be masked, else
    :class:`ModelError`.
    """
    rows_n = mask_N.nonzero().squeeze(1)
    width, mask_V = _common_vocabulary([student_head, teacher_head])
    accumulate = _accumulate_dtype(student_ND, student_head.weight_VD)
    teacher = _projection(teacher_ND, _local(teacher_head), width, mask_V, temperature, accumulate)

    def target(logits_nV: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        expected_nV, _ = _logits(teacher_ND.detach()[rows_n[part]], teacher)
        agree = _shift(logits_nV) == _shift(expected_nV)
        teacher_nV = expected_nV.clone()
        teacher_total = _exponentiate(teacher_nV)
        gap = expected_nV.sub_(logits_nV).mul_(teacher_nV).sum(1, keepdim=True)
        total = _exponentiate(logits_nV)
        logits_nV.sub_(teacher_nV)
        return (gap - teacher_total.log() + total.log()).squeeze(1), agree

    return _fused(student_ND, student_head, rows_n, target, temperature, width, mask_V, chunk)


class _Projection(NamedTuple):
    """A head made ready: cut to the common vocabulary, in the dtype of its products."""

    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None
    scale: float
    hidden_V: Tensor | None
    """True for ids without probability."""
    temperature: float
    accumulate: torch.dtype


Target = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""``(logits_nV, rows) -> (KL per row in nats, agreement per row)``; turns the tempered logits into ``p - t`` in place."""


def _fused(
    hidden_ND: Tensor,
    head: Head,
    rows_n: Tensor,
    target: Target,
    temperature: float,
    width: int,
    mask_V: Tensor | None,
    chunk: int,
) -> tuple[Tensor, FusedMetrics]:
    head = _local(head)
    projection = _projection(hidden_ND, head, width, mask_V, temperature, _accumulate_dtype(hidden_ND, head.weight_VD))
    # Asked here: inside the function grad mode is always off.
    wants = torch.is_grad_enabled()
    loss, kl, agreement = _FusedLoss.apply(hidden_ND, head.weight_VD, head.bias_V, projection, rows_n, target, chunk, wants)
    return loss, FusedMetrics(agreement, torch.tensor(rows_n.numel(), device=rows_n.device), kl)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        projection: _Projection,
        rows_n: Tensor,
        target: Target,
        chunk: int,
        wants: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        accumulate, temperature = projection.accumulate, projection.temperature
        width, dtype = projection.weight_VD.shape[0], projection.weight_VD.dtype
        wants_hidden, wants_weight, wants_bias = (wants and needed for needed in ctx.needs_input_grad[:3])

        def zeros(like: Tensor, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=accumulate, device=like.device)

        dhidden = hidden_ND.new_empty(rows_n.numel(), hidden_ND.shape[1]) if wants_hidden else None
        dweight = zeros(weight_VD, *weight_VD.shape) if wants_weight else None
        dbias = zeros(weight_VD, weight_VD.shape[0]) if wants_bias else None
        kl_n = zeros(hidden_ND, rows_n.numel())
        agreement = torch.zeros((), dtype=torch.int64, device=hidden_ND.device)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start in range(0, rows_n.numel(), chunk):
                part = slice(start, start + chunk)
                hidden_nD = hidden_ND[rows_n[part]].to(dtype)
                logits_nV, slope_nV = _logits(hidden_nD, projection)
                kl_n[part], agree_n = target(logits_nV, part)
                agreement += agree_n.sum()
                if not (wants_hidden or wants_weight or wants_bias):
                    continue
                if slope_nV is not None:
                    logits_nV.mul_(slope_nV)
                # T^2 of the loss times 1/T of the tempering; the bias stands inside the scale too.
                logits_nV.mul_(temperature * projection.scale)
                if dbias is not None:
                    dbias[:width] += logits_nV.sum(0)
                dlogits_nV = logits_nV.to(dtype)
                if dhidden is not None:
                    dhidden[part] = dlogits_nV @ projection.weight_VD
                if dweight is not None:
                    if dtype == accumulate:
                        dweight[:width].addmm_(dlogits_nV.mT, hidden_nD)
                    else:
                        dweight[:width] += dlogits_nV.mT @ hidden_nD
        ctx.shape = hidden_ND.shape
        ctx.dtypes = weight_VD.dtype, None if bias_V is None else bias_V.dtype
        ctx.save_for_backward(rows_n, dhidden, dweight, dbias)
        kl = kl_n.sum()
        ctx.mark_non_differentiable(kl, agreement)
        return kl * temperature**2, kl, agreement

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _dkl: Tensor, _dagreement: Tensor) -> tuple[Tensor | None, ...]:
        rows_n, dhidden, dweight, dbias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        spread = None
        if dhidden is not None:
            spread = dhidden.new_zeros(ctx.shape).index_copy_(0, rows_n, (dhidden * dloss).to(dhidden.dtype))
        weight = None if dweight is None else (dweight * dloss).to(weight_dtype)
        bias = None if dbias is None else (dbias * dloss).to(bias_dtype)
        return spread, weight, bias, None, None, None, None, None


def _local(head: Head) -> Head:
    """The head with whole, plain tensors.

    Every rank holds a part of a sharded weight and uses all of it for its own tokens, so each rank's gradient is a partial sum.
    """

    def whole(x: Tensor | None) -> Tensor | None:
        return x.full_tensor(grad_placements=[Partial()] * x.device_mesh.ndim) if isinstance(x, DTensor) else x

    weight_VD = whole(head.weight_VD)
    assert weight_VD is not None
    return Head(weight_VD, whole(head.bias_V), head.softcap, head.scale, head.vocab_mask_V)


def _common_vocabulary(heads: list[Head]) -> tuple[int, Tensor | None]:
    """``(width, mask)``: the ids below ``width`` of which every head has those in ``mask`` (all of them if None)."""
    width = min(head.weight_VD.shape[0] for head in heads)
    common_V: Tensor | None = None
    for head in heads:
        rows, mask_V = head.weight_VD.shape[0], head.vocab_mask_V
        beyond = rows - width if mask_V is None else int(mask_V[width:].sum())
        if beyond:
            raise ModelError(
                f"head: {beyond} ids from {width} on exist on one side only (widths {[h.weight_VD.shape[0] for h in heads]}); "
                "distributions over different vocabularies are not compared: if these rows are padding, mask them in vocab_mask_V"
            )
        if mask_V is not None:
            common_V = mask_V[:width] if common_V is None else common_V & mask_V[:width]
    if common_V is None:
        return width, None
    ids = common_V.nonzero()
    if not ids.numel():
        raise ModelError("head: vocab_mask_V leaves no id that exists; a mask is True for the ids of the tokenizer")
    # A padded tail is cut off, which is cheaper than masking it.
    width = int(ids[-1]) + 1
    return width, None if ids.numel() == width else common_V[:width]


def _accumulate_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32


def _projection(
    hidden: Tensor, head: Head, width: int, mask_V: Tensor | None, temperature: float, accumulate: torch.dtype
) -> _Projection:
    """The head in the dtype in which ``hidden @ weight.T`` would be computed here."""
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, head.weight_VD.dtype)
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    bias_V = None if head.bias_V is None else head.bias_V.detach()[:width].to(accumulate)
    hidden_V = None if mask_V is None else ~mask_V
    weight_VD = head.weight_VD.detach()[:width].to(dtype)
    return _Projection(weight_VD, bias_V, head.softcap, head.scale, hidden_V, temperature, accumulate)


def _logits(hidden_nD: Tensor, head: _Projection) -> tuple[Tensor, Tensor | None]:
    """Tempered logits ``[n, V]`` and, with a soft-cap, its slope there."""
    with torch.autocast(hidden_nD.device.type, enabled=False):
        logits_nV = (hidden_nD.to(head.weight_VD.dtype) @ head.weight_VD.mT).to(head.accumulate)
    if head.bias_V is not None:
        logits_nV.add_(head.bias_V)
    slope_nV = None
    factor = head.scale / head.temperature
    if head.softcap is not None:
        logits_nV.mul_(head.scale / head.softcap).tanh_()
        slope_nV = 1 - logits_nV.square()
        factor = head.softcap / head.temperature
    if factor != 1:
        logits_nV.mul_(factor)
    if head.hidden_V is not None:
        # Finite: the difference of two such logits is 0, where -inf - -inf would be NaN.
        logits_nV.masked_fill_(head.hidden_V, torch.finfo(logits_nV.dtype).min / 4)
    return logits_nV, slope_nV


def _shift(logits_nV: Tensor) -> Tensor:
    """Subtract each row's maximum in place; returns where it stood."""
    top, where = logits_nV.max(1, keepdim=True)
    logits_nV.sub_(top)
    return where.squeeze(1)


def _exponentiate(shifted_nV: Tensor) -> Tensor:
    """Logits with maximum 0 -> probabilities, in place; returns the row sums ``[n, 1]`` of the exponentials."""
    total = shifted_nV.exp_().sum(1, keepdim=True)
    shifted_nV.div_(total)
    return total
