"""The logarithm of a teacher's partition sum at the loss's temperature: looked up, or estimated where the source has it at another.

Shape legend: n tokens, K kept ids, Z temperatures.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from limbeck.errors import DataError
from limbeck.types import TopKSignal


def tempered_log_z(signal: TopKSignal, temperature: float, num_ids: int, allow_approximate_tail: bool) -> Tensor:
    """``log sum exp(logits / T)`` ``[n]``, from the signal's column for ``T``.

    Without that column :class:`DataError`, or with ``allow_approximate_tail`` :func:`approximate_log_z` from the nearest
    temperature that is there; ``num_ids`` is the size of the vocabulary.
    """
    column = next((i for i, t in enumerate(signal.temperatures) if math.isclose(t, temperature, rel_tol=1e-6)), None)
    if column is not None:
        return signal.log_z_nZ[:, column]
    if not allow_approximate_tail or not signal.ids_nK.shape[1]:
        there = ", ".join(f"{t:g}" for t in signal.temperatures) or "none"
        raise DataError(
            f"temperature {temperature:g}: the teacher's signal has partition sums at temperature {there} only, so the mass of what "
            "its top ids leave is not known at this one; use a teacher that gives it (local, or `limbeck teach`), a temperature that "
            "is there, or `allow_approximate_tail: true`"
        )
    column = min(range(len(signal.temperatures)), key=lambda i: abs(math.log(signal.temperatures[i] / temperature)))
    return approximate_log_z(signal.logits_nK, signal.log_z_nZ[:, column], signal.temperatures[column], temperature, num_ids)


def approximate_log_z(logits_nK: Tensor, log_z_n: Tensor, known_at: float, temperature: float, num_ids: int) -> Tensor:
    """``log_z`` ``[n]`` at ``temperature`` from the likeliest ``K`` logits and ``log_z_n`` at temperature ``known_at``.

    The tail is taken for a power of the rank: ``logit(i) = logit(K) - a log(i / K)`` for ``i`` up to ``num_ids``, with the ``a``
    that gives the tail the mass it is known to have at ``known_at`` (sums over ranks as integrals).  It continues the kept
    logits and has one free number for the one that is known.  Measured with K = 8 to 128 and T = 0.5 to 4, the tail's mass
    is wrong by less than 0.05 on average over positions, on the built-in model and on Zipf's law with noise (32,000 ids);
    keeping the mass of T = 1 is wrong by up to 0.9.
    """
    # Rows may be padded with -inf at their end; no row has more than these K.
    kept_nK = logits_nK.double()
    counts_n = (kept_nK > -torch.inf).sum(1).clamp_min(1)
    last_n = kept_nK.gather(1, counts_n[:, None] - 1).squeeze(1)
    k_n = counts_n.double()
    sum_n = (kept_nK / temperature).logsumexp(1)
    mass_n = ((kept_nK / known_at).logsumexp(1) - log_z_n.double()).exp()
    has_tail_n = (counts_n < num_ids) & (mass_n < 1) & (last_n > -torch.inf)
    rest_n = (1 - mass_n).clamp_min(1e-12)
    # Ranks from K + 1/2 to num_ids + 1/2, in units of log(i / K).
    first_n = ((k_n + 0.5) / k_n).log()
    length_n = (((num_ids + 0.5) / k_n).log() - first_n).clamp_min(1e-12)

    def log_tail(exponent_n: Tensor) -> Tensor:
        """``log sum_i (i / K)^-exponent``."""
        growth_n = 1 - exponent_n
        return growth_n * first_n + (k_n * length_n).log() + _log_mean_exp(growth_n * length_n)

    wanted_n = rest_n.log() + log_z_n.double() - last_n / known_at
    low_n, high_n = torch.zeros_like(k_n), torch.full_like(k_n, 1e3)
    for _ in range(60):
        middle_n = (low_n + high_n) / 2
        too_heavy_n = log_tail(middle_n) > wanted_n
        low_n, high_n = torch.where(too_heavy_n, middle_n, low_n), torch.where(too_heavy_n, high_n, middle_n)
    exponent_n = (low_n + high_n) / 2 * (known_at / temperature)
    tail_n = last_n / temperature + log_tail(exponent_n)
    return torch.where(has_tail_n, torch.logaddexp(sum_n, tail_n), sum_n).to(log_z_n.dtype)


def _log_mean_exp(y: Tensor) -> Tensor:
    """``log((exp(y) - 1) / y)``, the logarithm of the mean of ``exp`` between 0 and ``y``."""
    size = y.abs().clamp_min(1e-12)
    return (-torch.expm1(-size) / size).log() + y.clamp_min(0)
