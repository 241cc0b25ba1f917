"""Products ``B @ A`` of low rank, compared and decomposed without ever being formed.

``A [..., R, I]``, ``B [..., O, R]``: the product is ``[..., O, I]``, far larger than its factors.  All leading dimensions are batch.
Half-precision factors are computed with in fp32.  With a second moment ``C [..., I, I] = E[x x^T]`` of a Linear's inputs, ``A A^T`` is
replaced by ``A C A^T``: then the squared norm of a product is the mean squared norm of what it adds to the Linear's output.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PAIRWISE_NUMBERS = 2**25
"""Numbers that a chunk of :func:`pairwise_inner` may hold between its two products."""


def widened(tensor: Tensor) -> Tensor:
    """The numbers of ``tensor`` (any shape) in fp32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def filled(tensor: Tensor, dim: int, size: int) -> Tensor:
    """``tensor [...]`` with zeros behind it along ``dim``, up to ``size``: factors of a larger rank and the same product."""
    if tensor.shape[dim] == size:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = size - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def inner(A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, moment: Tensor | None = None) -> Tensor:
    """``<B1 A1, B2 A2>_F = tr((A1 C A2^T)(B2^T B1))``, ``[...]``; the two ranks R and S may differ.

    ``A1 [..., R, I]``, ``B1 [..., O, R]``, ``A2 [..., S, I]``, ``B2 [..., O, S]``; C is ``moment [..., I, I]``.
    """
    A1, B1, A2, B2 = widened(A1), widened(B1), widened(A2), widened(B2)
    return ((_whiten(A1, moment) @ A2.mT) * (B1.mT @ B2)).sum((-2, -1))


def pairwise_inner(A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, moment: Tensor | None = None) -> Tensor:
    """All inner products of N products with M others, ``[N, M, ...]``.

    ``A1 [N, ..., R, I]``, ``B1 [N, ..., O, R]``, ``A2 [M, ..., S, I]``, ``B2 [M, ..., O, S]``: the factors of all adapters are joined
    along the rank, so that it takes two products; rows of N are taken so many at a time that memory stays bounded.
    C is ``moment [..., I, I]``.
    """
    A1, B1, A2, B2 = widened(A1), widened(B1), widened(A2), widened(B2)
    A1 = _whiten(A1, moment)
    width = max(1, A1.shape[-2] * A2.shape[0] * A2.shape[-2] * A1[0, ..., 0, 0].numel())
    rows = max(1, _PAIRWISE_NUMBERS // width)
    right_A, right_B = _joined(A2), _joined(B2.mT)
    return torch.cat([_pairs(a, b, right_A, right_B, A2.shape[0]) for a, b in zip(A1.split(rows), B1.mT.split(rows), strict=True)])


def squared_norm(A: Tensor, B: Tensor, moment: Tensor | None = None) -> Tensor:
    """``|B A|_F^2``, ``[...]``, never below zero, of ``A [..., R, I]`` and ``B [..., O, R]``; ``moment`` as in :func:`inner`."""
    return inner(A, B, A, B, moment).clamp_min(0)


def squared_distance(A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, moment: Tensor | None = None) -> Tensor:
    """``|B1 A1 - B2 A2|_F^2``, ``[...]``, of factors and ``moment`` as in :func:`inner`; the two ranks may differ.

    Through ``B1 (A1 - A2) + (B1 - B2) A2``, whose terms are small where the factors are close; the difference of the two squared
    norms would lose the digits that a loss near its minimum is made of.
    """
    rank = max(A1.shape[-2], A2.shape[-2])
    A1, A2 = (filled(widened(A), -2, rank) for A in (A1, A2))
    B1, B2 = (filled(widened(B), -1, rank) for B in (B1, B2))
    return squared_norm(torch.cat([A1 - A2, A2], -2), torch.cat([B1, B1 - B2], -1), moment)


def root(squares: Tensor) -> Tensor:
    """Square roots of ``squares`` (any shape) whose gradient at zero is zero, as of the norm of a LoRA whose B is still zero."""
    zero = squares == 0
    return torch.where(zero, 0, torch.where(zero, 1, squares).sqrt())


def product_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of ``B A``: ``U [..., O, K]``, ``S [..., K]`` descending, ``Vt [..., K, I]`` with K = min(O,
    R, I), for ``A [..., R, I]`` and ``B [..., O, R]``.

    By QR of both factors and the decomposition of a matrix no larger than the rank.  A zero product has S = 0 and orthonormal U, Vt.
    """
    Q_B, R_B = torch.linalg.qr(widened(B))
    Q_A, R_A = torch.linalg.qr(widened(A).mT)
    U, S, Vt = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ U, S, Vt @ Q_A.mT


def balanced(U: Tensor, S: Tensor, Vt: Tensor) -> tuple[Tensor, Tensor]:
    """Factors ``A = sqrt(S) Vt``, ``B = U sqrt(S)`` with the largest entry of each column of U made positive.

    ``U [..., O, K]``, ``S [..., K]``, ``Vt [..., K, I]``, as :func:`product_svd` gives them.
    """
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    root_S = S.sqrt()
    signed = torch.where(largest < 0, -1.0, 1.0).to(S.dtype).squeeze(-2) * root_S
    return signed.unsqueeze(-1) * Vt, U * signed.unsqueeze(-2)


def _whiten(A: Tensor, moment: Tensor | None) -> Tensor:
    return A if moment is None else A @ widened(moment)


def _joined(factors: Tensor) -> Tensor:
    """``[M, ..., S, I]`` as ``[..., M * S, I]``."""
    return factors.movedim(0, -3).flatten(-3, -2)


def _pairs(A: Tensor, Bt: Tensor, right_A: Tensor, right_Bt: Tensor, count: int) -> Tensor:
    """``A [n, ..., R, I]``, ``Bt [n, ..., R, O]`` against the M joined ones: ``[n, M, ...]``."""
    grams = (_joined(A) @ right_A.mT) * (_joined(Bt) @ right_Bt.mT)
    sizes = (A.shape[0], A.shape[-2], count, right_A.shape[-2] // count)
    return grams.unflatten(-1, sizes[2:]).unflatten(-3, sizes[:2]).sum((-3, -1)).movedim((-2, -1), (0, 1))
