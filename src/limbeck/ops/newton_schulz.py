"""The nearest semi-orthogonal matrix, roughly, by an odd polynomial of the singular values: what Muon makes of a momentum.

``X <- a X + (b X X^T + c (X X^T)^2) X`` with the quintic of Jordan et al. (github.com/KellerJordan/Muon): after five steps every
singular value that was above about a thousandth of the largest lies between 0.68 and 1.14; it does not converge to 1, and need not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""a, b, c."""
STEPS = 5
_NUMBERS = {"cpu": 2**20, "cuda": 2**26}
"""Numbers of the matrices that are multiplied together: on a CPU they stay in its caches, on a GPU their copies stay small."""


def orthogonalised(x_NOI: Tensor, *, steps: int = STEPS, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``U V^T`` of each matrix ``[..., O, I]``, roughly, in the dtype of ``x``; zero matrices stay zero.

    ``dtype`` is what the products are made in.  Each matrix is scaled by its Frobenius norm in fp32 (fp64 for fp64) first, so that
    no product leaves the range of ``dtype`` and the result does not depend on the size of ``x``.
    """
    if x_NOI.numel() == 0:
        return x_NOI.clone()
    wide = torch.promote_types(x_NOI.dtype, torch.float32)
    tiny = torch.finfo(wide).tiny
    x = x_NOI.to(wide)
    # By the largest number first: squares of small gradients are zero in fp32.
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(tiny)).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        # The smaller of the two Gram matrices costs less.
        x = x.mT
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(x_NOI.dtype)


def orthogonalise(stacks: Sequence[Tensor], *, steps: int = STEPS, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """:func:`orthogonalised` of stacks ``[N_i, O, I]`` of one shape of matrix, as many matrices at a time as fit the caches."""
    results = [torch.empty_like(stack) for stack in stacks]
    for pieces in _together(stacks):
        found = orthogonalised(torch.cat([stacks[i][span] for i, span in pieces]), steps=steps, dtype=dtype)
        for (i, span), part in zip(pieces, found.split([span.stop - span.start for _, span in pieces]), strict=True):
            results[i][span] = part
    return results


def _together(stacks: Sequence[Tensor]) -> Iterator[list[tuple[int, slice]]]:
    """Pieces of the stacks, in order, that fit the caches together; at least one matrix each."""
    outputs, inputs = stacks[0].shape[-2:]
    room = most = max(1, _NUMBERS.get(stacks[0].device.type, _NUMBERS["cuda"]) // (outputs * inputs))
    pieces: list[tuple[int, slice]] = []
    for i, stack in enumerate(stacks):
        start = 0
        while start < len(stack):
            taken = min(room, len(stack) - start)
            pieces.append((i, slice(start, start + taken)))
            start, room = start + taken, room - taken
            if not room:
                yield pieces
                pieces, room = [], most
    if pieces:
        yield pieces
