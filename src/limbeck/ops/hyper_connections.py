"""Residual streams and the matrices that mix them: manifold-constrained hyper-connections.

mHC (arXiv 2512.24880) makes the mixing matrix doubly stochastic by Sinkhorn's iterations, mHC-lite (arXiv 2601.05732) as a mixture of
all permutations (Birkhoff's theorem: every doubly stochastic matrix is one).  Shape legend: S streams, M mixtures of them, P = S!
permutations.
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor


def sinkhorn(logits_SS: Tensor, iterations: int) -> Tensor:
    """``exp(logits)`` with columns and rows made to sum to 1 in turns, ``[..., S, S]`` to the same; rows come last and are exact.

    In logarithms, so that no row can vanish.
    """
    for _ in range(iterations):
        logits_SS = logits_SS - logits_SS.logsumexp(-2, keepdim=True)
        logits_SS = logits_SS - logits_SS.logsumexp(-1, keepdim=True)
    return logits_SS.exp()


def permutation_mixture(logits_P: Tensor, streams: int) -> Tensor:
    """``sum_p softmax(logits)[p] * permutation p``, ``[..., S!]`` to ``[..., S, S]``.

    Permutations are in lexicographic order: the first is the identity.
    """
    order = list(permutations(range(streams)))
    matrices_PSS = torch.tensor([[[float(j == to) for j in range(streams)] for to in p] for p in order], dtype=logits_P.dtype, device=logits_P.device)
    # Not a matrix product, which autocast would round to bf16.
    return (logits_P.softmax(-1)[..., None, None] * matrices_PSS).sum(-3)


def mix(weights_MS: Tensor, x_SD: Tensor) -> Tensor:
    """``sum_s weights[m, s] * x[s]``: ``[..., M, S]`` and ``[..., S, D]`` to ``[..., M, D]``, in the wider of the two dtypes.

    Not a matrix product: the residual stream must not be rounded to what autocast or TF32 multiply in.
    """
    parts = (weights_MS[..., s, None] * x_SD[..., None, s, :] for s in range(x_SD.shape[-2]))
    total = next(parts)
    for part in parts:
        total = total + part
    return total
