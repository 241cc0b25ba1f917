"""A causal depthwise convolution over a few tokens that respects packed documents.

It is written as a sum over the taps: kernels are 2-4 tokens wide, and a product a tap needs neither the channels-first
layout nor the dense-mask tricks that a library convolution would.  Shape legend: C channels, W taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.ops.packing import document_segments


def short_convolution(
    x_BTC: Tensor, weight_CW: Tensor, *, documents_BT: Tensor | None = None, tail_BCW: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``y[t] = sum_w weight[:, w] x[t - (W - 1) + w]`` over the tokens of the same document.

    ``tail_BCW`` holds the last ``W - 1`` inputs before the row, ``[B, C, W - 1]`` (zeros if not given); a row's first
    document continues it.  Returns ``(y_BTC, new_tail)`` in the dtype of ``x``, the tail for the tokens that follow.
    ``documents_BT`` is -1 on padding, which stands at a row's ends: it reads and adds nothing, and the new tail ends at the
    last real token.
    """
    batch, num_tokens, channels = x_BTC.shape
    past = weight_CW.shape[1] - 1
    if tail_BCW is None:
        tail_BCW = x_BTC.new_zeros(batch, channels, past)
    padded = torch.cat([tail_BCW.mT.to(x_BTC.dtype), x_BTC], 1)
    if documents_BT is None:
        y_BTC = padded[:, past:] * weight_CW[:, past]
        for w in range(past):
            y_BTC = y_BTC + padded[:, w : w + num_tokens] * weight_CW[:, w]
        return y_BTC.to(x_BTC.dtype), padded[:, num_tokens:].mT

    real_BT, segments_BT = document_segments(documents_BT)
    # The tail belongs to segment 0; padding to none.
    segments = torch.cat([segments_BT.new_zeros(batch, past), torch.where(real_BT, segments_BT, -1)], 1)
    y_BTC = torch.zeros_like(x_BTC)
    for w in range(past + 1):
        seen_BT = (segments[:, w : w + num_tokens] == segments_BT) & real_BT
        y_BTC = y_BTC + torch.where(seen_BT[..., None], padded[:, w : w + num_tokens], 0) * weight_CW[:, w]

    steps = torch.arange(padded.shape[1], device=x_BTC.device)
    end_B1 = torch.where(segments >= 0, steps, 0).amax(1, keepdim=True)
    window = end_B1 + torch.arange(1 - past, 1, device=x_BTC.device)
    same = segments.gather(1, window) == segments.gather(1, end_B1)
    tail = padded.gather(1, window[..., None].expand(-1, -1, channels))
    return y_BTC.to(x_BTC.dtype), torch.where(same[..., None], tail, 0).mT
