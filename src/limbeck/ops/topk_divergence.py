"""Divergences from a teacher of which only the likeliest ids are known, or ids drawn from it.

The teacher's tempered probabilities ``t`` are known on the kept ids ``K``, and through its partition sum so is the mass ``r``
of the rest.  The student has ``p`` and the rest ``q = 1 - sum_K p``.  What a mode makes of the rest, and the gradient with
respect to the tempered logits (on K; off K):

    tail            k + 1 categories   sum_K t log(t/p) + r log(r/q)     p - t;             p (1 - r/q)
    tail, reverse                      sum_K p log(p/t) + q log(q/r)     p (log(p/t) - L);  p (log(q/r) - L)
    zero            no rest            sum_K t log(t/p)                  m p - t;           m p             m = sum_K t
    renorm_teacher  t / m              sum_K t/m log(t/(m p))            p - t/m;           p
    renorm_both     t / m, p / sum p   the same, both normalised on K    p/sum_K p - t/m;   0

The tail's is the KL of a coarser partition: never above the full KL, equal to it when K is everything.  The others have another
optimum than the teacher (``zero`` and ``renorm_teacher`` sharpen it by 1/m, ``renorm_both`` leaves mass off K free) and exist for
comparison.  Ids drawn from the rest (from the whole distribution when K is empty; Anshumann et al. 2025, arXiv 2503.16870) stand for
it with weight ``r / S`` each, which makes the gradient's mean that of the full KL.

``q`` is the sum of what is off K, never ``1 - sum_K p``, which would cancel.

Shape legend: N tokens, n tokens that count, D width, V vocabulary, K kept ids, S samples, Z temperatures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from limbeck.errors import DataError
from limbeck.ops.fused import Target, fused
from limbeck.ops.projection import accumulate_dtype, chunk_for, common_vocabulary, exponentiate, shift
from limbeck.ops.tempering import tempered_log_z
from limbeck.types import Head, TopKSignal

Tail = Literal["tail", "zero", "renorm_both", "renorm_teacher"]
Direction = Literal["forward", "reverse"]

GATHERED_BYTES = 2**26
"""Rows of the head that `renorm_both` gathers at one time, at most."""


@dataclass(frozen=True)
class TopKMetrics:
    """What the chunks give for free: sums over ``count`` tokens, at the loss's temperature without T squared.

    ``count``, ``loss``, ``kl``, ``mass``, ``tail_gap`` and ``agreement`` are detached scalars.
    """

    count: Tensor
    """Tokens that counted."""
    loss: Tensor
    """The loss in nats without T squared."""
    kl: Tensor | None
    """Forward KL over the kept ids and the rest, whatever the loss; without K there is none."""
    mass: Tensor | None
    """The teacher's probability of the kept ids."""
    tail_gap: Tensor | None
    """|q - r|: how far the student's probability of the rest is from the teacher's (`renorm_both` does not know it)."""
    agreement: Tensor | None
    """Tokens at which the student's likeliest id is the teacher's (`renorm_both` does not know it)."""


class _Teacher(NamedTuple):
    """What is known of a teacher's rows, in the dtype of the sums; nowhere infinite."""

    ids_nK: Tensor
    known_nK: Tensor
    """False where a row has fewer than K ids, or the student does not have the id."""
    t_nK: Tensor
    log_t_nK: Tensor
    rest_n: Tensor
    """r, not negative."""
    draws_nS: Tensor | None
    draw_weight_nS: Tensor | None
    precision: float
    """The smallest part of 1 that the signal can tell."""


def linear_topk_divergence(
    hidden_ND: Tensor,
    head: Head,
    signal: TopKSignal,
    *,
    k: int | None = None,
    tail: Tail = "tail",
    direction: Direction = "forward",
    temperature: float = 1.0,
    allow_approximate_tail: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, TopKMetrics]:
    """``T^2 * sum divergence`` in nats over ``signal.rows_n`` of ``hidden_ND``; gradients flow to hidden states, weight and bias.

    ``k`` takes the first so many ids of a signal that has more.  With ``signal.samples_nS`` the tail is what they say it is
    (``tail`` must be `tail`, ``direction`` `forward`, and they must have been drawn at this temperature from what these K ids
    leave); the value then lacks the entropy of the teacher's rest, a constant.  ``direction`` `reverse` needs ``tail`` `tail`.  A
    kept id with logit ``-inf`` is none; an id that the student's head masks has no probability on either side.

    ``temperature`` other than those of ``signal.log_z_nZ`` raises :class:`DataError` unless ``allow_approximate_tail``, when
    :func:`~limbeck.ops.tempering.approximate_log_z` fills in.  An id that the head does not have raises :class:`DataError`.
    ``chunk`` is the number of tokens whose logits exist at one time (None: by the device; one buffer of ``[chunk, V]``).
    """
    sampled = signal.samples_nS is not None
    if sampled + (direction == "reverse") + (tail != "tail") > 1:
        raise ValueError("samples, direction='reverse' and another tail than 'tail' exclude each other")
    if not len(signal.rows_n) and not signal.ids_nK.shape[1] and k != 0:
        # Nothing was asked, and an empty answer does not say how many ids it would have kept.
        signal = replace(signal, ids_nK=signal.ids_nK.new_zeros(0, k or 1), logits_nK=signal.logits_nK.new_zeros(0, k or 1))
    width, mask_V = common_vocabulary([head])
    rows, dtype = head.weight_VD.shape[0], accumulate_dtype(hidden_ND, head.weight_VD)
    teacher = _known(signal, k, width, mask_V, rows, temperature, allow_approximate_tail, dtype)
    if not teacher.ids_nK.shape[1] and not sampled and len(teacher.ids_nK):
        raise ValueError("a signal without kept ids and without samples says nothing")
    rows_n = signal.rows_n
    count = torch.tensor(rows_n.numel(), device=rows_n.device)
    if tail == "renorm_both":
        target, ids_nK = _on_kept_ids(teacher), teacher.ids_nK
        gathered = max(ids_nK.shape[1] * head.weight_VD.shape[1] * head.weight_VD.element_size(), 1)
        chunk = max(1, min(chunk or chunk_for(hidden_ND.device), GATHERED_BYTES // gathered))
    else:
        target, ids_nK = _on_everything(teacher, tail, direction), None
    loss, sums = fused(hidden_ND, head, rows_n, target, temperature, width, mask_V, chunk, ids_nK)
    if tail == "renorm_both":
        return loss, TopKMetrics(count, sums[0], sums[0], sums[1], None, None)
    if not teacher.ids_nK.shape[1]:
        return loss, TopKMetrics(count, sums[0], None, None, None, None)
    return loss, TopKMetrics(count, *sums)


def _known(
    signal: TopKSignal,
    k: int | None,
    width: int,
    mask_V: Tensor | None,
    rows: int,
    temperature: float,
    approximate: bool,
    dtype: torch.dtype,
) -> _Teacher:
    # One minus the kept mass cancels: what is small against [n, V] is done with the digits that takes.
    wide = torch.float32 if signal.logits_nK.device.type == "mps" else torch.float64
    ids_nK, logits_nK = signal.ids_nK[:, :k], signal.logits_nK[:, :k].to(wide)
    num_ids = width if mask_V is None else int(mask_V.sum())
    there_nK = logits_nK > -torch.inf
    _refuse_foreign(ids_nK[there_nK], rows)
    known_nK = there_nK & _exist(ids_nK, width, mask_V)
    log_z_n = tempered_log_z(signal, temperature, num_ids, approximate).to(wide)
    log_t_nK = logits_nK / temperature - log_z_n[:, None]
    if mask_V is not None or width < rows:
        # The student's vocabulary is the smaller one: what it lacks has no probability on the teacher's side either.
        foreign_n = log_t_nK.exp().masked_fill(known_nK | ~there_nK, 0).sum(1, keepdim=True)
        log_t_nK = log_t_nK - torch.log1p(-foreign_n.clamp_max(1 - torch.finfo(wide).eps))
    mass_n = log_t_nK.masked_fill(~known_nK, -torch.inf).logsumexp(1)
    # When every id is kept the rest is none, not what rounding leaves of it.
    rest_n = (-torch.expm1(mass_n)).clamp_min(0).masked_fill(known_nK.sum(1) >= num_ids, 0).to(dtype)
    log_t_nK = log_t_nK.masked_fill(~known_nK, 0).to(dtype)
    t_nK = log_t_nK.exp() * known_nK
    draws_nS = weight_nS = None
    if signal.samples_nS is not None:
        if not math.isclose(temperature, signal.temperatures[0], rel_tol=1e-6) or ids_nK.shape[1] != signal.ids_nK.shape[1]:
            raise DataError(
                f"samples: drawn at temperature {signal.temperatures[0]:g} from what the {signal.ids_nK.shape[1]} likeliest ids leave; "
                f"the loss has temperature {temperature:g} and keeps {ids_nK.shape[1]}: they must be the same"
            )
        _refuse_foreign(signal.samples_nS, rows)
        drawn_nS = _exist(signal.samples_nS, width, mask_V)
        draws_nS = signal.samples_nS.masked_fill(~drawn_nS, 0)
        weight_nS = drawn_nS * (rest_n / drawn_nS.sum(1).clamp_min(1))[:, None]
    precision = torch.finfo(signal.log_z_nZ.dtype).eps
    return _Teacher(ids_nK.masked_fill(~known_nK, 0), known_nK, t_nK, log_t_nK, rest_n, draws_nS, weight_nS, precision)


def _exist(ids: Tensor, width: int, mask_V: Tensor | None) -> Tensor:
    """Which ids the student has."""
    below = (ids >= 0) & (ids < width)
    return below if mask_V is None else below & mask_V[ids.clamp(0, width - 1)]


def _refuse_foreign(ids: Tensor, rows: int) -> None:
    wrong = ids[(ids < 0) | (ids >= rows)]
    if wrong.numel():
        raise DataError(
            f"teacher's signal: token ids {wrong[:5].tolist()} are not among the {rows} of the student's head; teacher and student "
            "must have one tokenizer (the ids of a padded vocabulary are masked where the signal is made)"
        )


def _on_everything(teacher: _Teacher, tail: Tail, direction: Direction) -> Target:
    t_nK, log_t_nK, rest_n = teacher.t_nK, teacher.log_t_nK, teacher.rest_n
    mass_n = t_nK.sum(1)
    best_n = teacher.ids_nK.gather(1, t_nK.argmax(1, keepdim=True)).squeeze(1) if t_nK.shape[1] else None
    if tail == "renorm_teacher":
        t_nK, log_t_nK = _normalised(t_nK, log_t_nK, mass_n)
    if tail != "tail" or teacher.draws_nS is not None:
        rest_n = torch.zeros_like(rest_n)
    scale_n = t_nK.sum(1) + rest_n
    if teacher.draw_weight_nS is not None:
        scale_n = scale_n + teacher.draw_weight_nS.sum(1)
    tiny = torch.finfo(t_nK.dtype).tiny
    # A reverse KL is infinite where the teacher has nothing; what the signal's precision cannot tell from nothing is not.
    log_least = math.log(teacher.precision)

    def target(logits_nV: Tensor, part: slice) -> tuple[Tensor, ...]:
        ids, known, scale = teacher.ids_nK[part], teacher.known_nK[part], scale_n[part, None]
        guesses = shift(logits_nV)
        log_p = logits_nV.gather(1, ids)
        log_draws = None if teacher.draws_nS is None else logits_nV.gather(1, teacher.draws_nS[part])
        logits_nV.exp_()
        p = logits_nV.gather(1, ids).mul_(known)
        logits_nV.scatter_add_(1, ids, -p)
        q = logits_nV.sum(1, keepdim=True)
        total = q + p.sum(1, keepdim=True)
        log_p.sub_(total.log())
        p.div_(total)
        q = q / total
        log_q, log_r = q.clamp_min(tiny).log(), teacher.rest_n[part, None].clamp_min(tiny).log()

        def kl(t: Tensor, log_t: Tensor, rest: Tensor) -> Tensor:
            return (t * (log_t - log_p)).sum(1) + rest * (log_r - log_q).squeeze(1)

        gap = (q.squeeze(1) - teacher.rest_n[part]).abs()
        bucket = kl(teacher.t_nK[part], teacher.log_t_nK[part], teacher.rest_n[part])
        if direction == "reverse":
            ratio, off = log_p - log_t_nK[part], log_q - log_r.clamp_min(log_least)
            loss = (p * ratio).sum(1) + (q * off).squeeze(1)
            off = off - loss[:, None]
            fix = p * (ratio - loss[:, None])
        else:
            loss = kl(t_nK[part], log_t_nK[part], rest_n[part])
            off = scale - rest_n[part, None] / q.clamp_min(tiny)
            fix = scale * p - t_nK[part]
        logits_nV.mul_(off / total).scatter_add_(1, ids, fix)
        if log_draws is not None and teacher.draws_nS is not None and teacher.draw_weight_nS is not None:
            weight = teacher.draw_weight_nS[part]
            loss = loss - (weight * (log_draws - total.log())).sum(1)
            logits_nV.scatter_add_(1, teacher.draws_nS[part], -weight)
        if best_n is None:
            return (loss,)
        return loss, bucket, mass_n[part], gap, guesses == best_n[part]

    return target


def _on_kept_ids(teacher: _Teacher) -> Target:
    mass_n = teacher.t_nK.sum(1)
    t_nK, log_t_nK = _normalised(teacher.t_nK, teacher.log_t_nK, mass_n)

    def target(logits_nK: Tensor, part: slice) -> tuple[Tensor, ...]:
        shift(logits_nK.masked_fill_(~teacher.known_nK[part], torch.finfo(logits_nK.dtype).min / 4))
        t, log_p = t_nK[part], logits_nK.clone()
        total = exponentiate(logits_nK)
        log_p.sub_(total.log())
        # A row without any kept id has no loss.
        logits_nK.mul_(t.sum(1, keepdim=True)).sub_(t)
        return (t * (log_t_nK[part] - log_p)).sum(1), mass_n[part]

    return target


def _normalised(t_nK: Tensor, log_t_nK: Tensor, mass_n: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's probabilities of the kept ids made to sum to 1 (to 0 where there are none)."""
    mass_n1 = mass_n[:, None].clamp_min(torch.finfo(t_nK.dtype).tiny)
    return t_nK / mass_n1, log_t_nK - mass_n1.log()
