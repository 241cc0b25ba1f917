"""Rows cut into chunks of tokens, and what packing means inside them.

Layout of a chunked tensor: ``[c, B, H, C, ...]``, c chunks first, so that one chunk of all rows and heads is contiguous.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = -60.0
"""Decay within a chunk stops at ``e^-60 = 1e-26``: below fp64's resolution of anything it is added to, and far from denormal
numbers, on which exp and every product run tens of times slower."""


class ChunkMasks(NamedTuple):
    """Booleans that say which token of a chunk knows which; they broadcast against the shapes given."""

    within: Tensor
    """``[C, C]`` or ``[c, B, C, C]``: ``j <= i`` in one segment."""
    reads: Tensor
    """``[C, C]`` or ``[c, B, 1, C, C]``: the same where ``i`` is not padding."""
    enters: Tensor
    """``[]`` or ``[c, B, 1, C]``: the state that enters the chunk is alive at this token, which is not padding."""
    stays: Tensor
    """``[]`` or ``[c, B, 1, C]``: what this token writes is alive at the chunk's end."""
    survives: Tensor
    """``[]`` or ``[c, B, 1, 1]``: the entering state is alive at the chunk's end."""


def chunk_size(chunk: int, num_tokens: int) -> int:
    """``chunk`` as a power of two, not much longer than the row."""
    return 1 << (min(chunk, max(num_tokens, 8)) - 1).bit_length()


def to_chunks(x: Tensor, size: int) -> Tensor:
    """``x [B, T, H, ...] -> [c, B, H, C, ...]``, zeros after the end; a view when T is a multiple of C."""
    tail = -x.shape[1] % size
    if tail:
        x = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, tail))
    return x.unflatten(1, (-1, size)).movedim(1, 0).transpose(2, 3)


def to_tokens(x: Tensor, num_tokens: int) -> Tensor:
    """``x [c, B, H, C, D] -> [B, T, H, D]``: the way back."""
    return x.transpose(2, 3).movedim(0, 1).flatten(1, 2)[:, :num_tokens]


def chunk_masks(segments_BT: Tensor | None, real_BT: Tensor | None, size: int, device: torch.device) -> ChunkMasks:
    """Masks of rows whose segments and real tokens are as :func:`limbeck.ops.packing.document_segments` gives them, or of unpacked rows."""
    causal_CC = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    if segments_BT is None or real_BT is None:
        always = torch.ones((), dtype=torch.bool, device=device)
        return ChunkMasks(causal_CC, causal_CC, always, always, always)
    tail = -segments_BT.shape[1] % size
    segments_BT = torch.cat([segments_BT, segments_BT[:, -1:].expand(-1, tail)], 1)
    segments = segments_BT.unflatten(1, (-1, size)).movedim(1, 0)
    real = torch.nn.functional.pad(real_BT, (0, tail)).unflatten(1, (-1, size)).movedim(1, 0)
    last = segments[..., -1:]
    entering = torch.cat([torch.zeros_like(last[:1]), last[:-1]])
    within = causal_CC & (segments[..., :, None] == segments[..., None, :])
    return ChunkMasks(
        within=within,
        reads=(within & real[..., None]).unsqueeze(2),
        enters=((segments == entering) & real).unsqueeze(2),
        stays=(segments == last).unsqueeze(2),
        survives=(last == entering).unsqueeze(2),
    )
