"""A hyper-convolutional decoder in the manner of Drag-and-Drop LLMs (DnD, arXiv 2506.16406): condition states -> tokens of an adapter.

The states of S texts are an image ``[S, H, W]`` with H cells of text and W features.  Every level is convolved along each pair of its
three axes, the third being the channels, until the image is ``[tokens, rows, cols]``.  A baseline for the attention generator: nothing
is shared between the layers or the ranks of an adapter.

Where it differs from the published decoder:

* Padding is masked.  The published one reads the states of padding as if they were text; here an adapter depends on the texts alone.
* Long texts are shortened by averages over windows of consecutive tokens.  The published one views ``[tokens, features]`` as
  ``[features, tokens]`` without transposing, which scrambles the two, and mixes the result with linear maps of random start.
* The feature ladder is computed from the shapes, and small: 0.2 to 2 million parameters for bases of width 64 to 256, where the published
  ladder for a base of 0.5 billion has 1.1 billion.  That one can be given as ``levels`` (with ``kernel=9``).
* Each state is normalised on its own first: a decoder's first positions are hundreds of times larger than the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import AdapterError

Level = tuple[int, int, int]
"""(sequence, height, width) of the features: texts, cells and features at the start, tokens, rows and columns at the end."""
CELLS = 32
"""Most cells that a text has unless ``levels`` says otherwise."""
OUTPUT_SCALE = 0.5
"""On the last convolution at the start: tokens are then about 0.05, weights a twentieth of the size that DnD's codes call usual."""


class PlaneNorm(nn.Module):
    """Layer norm over (height, width) of each member of the sequence; cells outside the mask are not counted and come out as zeros."""

    def __init__(self, height: int, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(height, width))
        self.bias = nn.Parameter(torch.zeros(height, width))
        self.eps = eps

    def forward(self, x_NSHW: Tensor, mask_NSH: Tensor | None = None) -> Tensor:
        """``[N, S, H, W]``."""
        if mask_NSH is None:
            return F.layer_norm(x_NSHW, self.weight.shape, self.weight, self.bias, self.eps)
        there = mask_NSH.unsqueeze(-1).to(x_NSHW.dtype)
        count = (there.sum((-2, -1), keepdim=True) * x_NSHW.shape[-1]).clamp_min(1)
        centred = (x_NSHW - (x_NSHW * there).sum((-2, -1), keepdim=True) / count) * there
        variance = centred.square().sum((-2, -1), keepdim=True) / count
        return (centred * (variance + self.eps).rsqrt() * self.weight + self.bias) * there


class HyperConv(nn.Module):
    """One level: height and width by two paths of two convolutions each, in the two orders; then the sequence by a third."""

    def __init__(self, size: Level, to: Level, kernel: int):
        super().__init__()
        (n_in, h_in, w_in), (n_out, h_out, w_out) = size, to
        self.norm = PlaneNorm(h_in, w_in)
        self.width_first = nn.ModuleList([_conv(w_in, w_out, kernel), _conv(h_in, h_out, kernel)])
        self.height_first = nn.ModuleList([_conv(h_in, h_out, kernel), _conv(w_in, w_out, kernel)])
        self.bias = nn.Parameter(torch.empty(h_out, w_out).uniform_(-1, 1) / (h_out * w_out))
        self.sequence = _conv(n_in, n_out, kernel, bias=True)
        self.residual = size == to

    def forward(self, x_NSHW: Tensor, mask_NSH: Tensor | None = None) -> Tensor:
        """``[N, S', H', W']``; ``mask`` is True where a cell is there, None if all are."""
        x = self.norm(x_NSHW, mask_NSH)
        width, height = self.width_first
        linear = _over_height(height, _over_width(width, x))
        height, width = self.height_first
        squashed = _over_width(width, _over_height(height, x)).tanh()
        y = self.sequence((linear + squashed + self.bias) / 3)
        return x_NSHW + y if self.residual else y


class HyperConvDecoder(nn.Module):
    """Tokens ``[N, tokens, rows, cols]`` for ``DnDTokenizer.detokenize``, of the states of up to S texts of up to C tokens.

    Args:
        num_texts: S, most texts of a condition.
        text_tokens: C, most tokens of a text.
        width: D, size of a state.
        token_count, token_shape: ``num_tokens`` and ``token_shape`` of the tokeniser.
        levels: the feature ladder, from ``(num_texts, cells <= text_tokens, width)`` to ``(token_count, *token_shape)``; None is
            :func:`default_levels`.
        kernel: side of every convolution, odd.

    Raises:
        AdapterError: a ladder that does not begin or end so, or an even kernel.
    """

    def __init__(
        self,
        num_texts: int,
        text_tokens: int,
        width: int,
        token_count: int,
        token_shape: tuple[int, int],
        levels: Sequence[Level] | None = None,
        kernel: int = 3,
    ):
        super().__init__()
        ladder = [(n, h, w) for n, h, w in levels or default_levels(num_texts, text_tokens, width, token_count, token_shape)]
        self.num_texts, self.text_tokens, self.cells = num_texts, text_tokens, ladder[0][1]
        last = (token_count, *token_shape)
        if len(ladder) < 2 or ladder[0] != (num_texts, self.cells, width) or self.cells > text_tokens or ladder[-1] != last:
            raise AdapterError(
                f"levels: {ladder} must begin with ({num_texts}, at most {text_tokens}, {width}), the texts, cells and features of a condition, "
                f"and end with {last}, the adapter's tokens"
            )
        if kernel % 2 == 0:
            raise AdapterError(f"kernel: {kernel} is even; a convolution that keeps the size of its input needs an odd one, such as {kernel + 1}")
        self.levels = nn.ModuleList(HyperConv(size, to, kernel) for size, to in pairwise(ladder))
        with torch.no_grad():
            for parameter in self.levels[-1].sequence.parameters():
                parameter.mul_(OUTPUT_SCALE)

    def forward(self, states_NSCD: Tensor, mask_NSC: Tensor) -> Tensor:
        """Tokens ``[N, tokens, rows, cols]`` of states and a mask that is True where a token is there.

        Fewer texts or tokens than the decoder was built for are padded; what stands where the mask is False is never read.

        Raises:
            AdapterError: more texts or tokens than the decoder was built for.
        """
        x, mask = self._cells(states_NSCD, mask_NSC)
        for level in self.levels:
            x, mask = level(x, mask), None
        return x

    def _cells(self, states_NSCD: Tensor, mask_NSC: Tensor) -> tuple[Tensor, Tensor]:
        """Means of the normalised states over windows of tokens, ``[N, S, cells, D]``, and which windows hold any."""
        _, texts, tokens, size = states_NSCD.shape
        if texts > self.num_texts or tokens > self.text_tokens:
            raise AdapterError(
                f"a condition of {texts} texts of {tokens} tokens is more than this decoder reads ({self.num_texts} of {self.text_tokens}): "
                "give fewer, or build it with larger num_texts and text_tokens"
            )
        window = -(-self.text_tokens // self.cells)
        missing = (self.num_texts - texts, window * self.cells - tokens)
        # By selection, not by a product: what stands in padding may be NaN.
        states = torch.where(mask_NSC.unsqueeze(-1), states_NSCD.to(self.levels[0].bias.dtype), 0.0)
        states = F.pad(F.layer_norm(states, (size,)), (0, 0, 0, missing[1], 0, missing[0])).unflatten(2, (self.cells, window))
        count = F.pad(mask_NSC, (0, missing[1], 0, missing[0])).unflatten(2, (self.cells, window)).sum(-1)
        return states.sum(3) / count.clamp_min(1).unsqueeze(-1), count > 0


def default_levels(
    num_texts: int, text_tokens: int, width: int, token_count: int, token_shape: tuple[int, int], depth: int = 3
) -> list[Level]:
    """A ladder of ``depth`` levels from a condition to an adapter's tokens, each axis changing by a constant factor a level."""
    first = (num_texts, min(text_tokens, CELLS), width)
    last = (token_count, *token_shape)
    return [(_between(first, last, 0, at, depth), _between(first, last, 1, at, depth), _between(first, last, 2, at, depth)) for at in range(depth + 1)]


def _between(first: Level, last: Level, axis: int, at: int, depth: int) -> int:
    return round(first[axis] * (last[axis] / first[axis]) ** (at / depth))


def _conv(size: int, to: int, kernel: int, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(size, to, kernel, padding=kernel // 2, bias=bias)


def _over_width(conv: nn.Module, x_NSHW: Tensor) -> Tensor:
    """Convolve the (sequence, height) plane, width being the channels."""
    return conv(x_NSHW.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _over_height(conv: nn.Module, x_NSHW: Tensor) -> Tensor:
    """Convolve the (sequence, width) plane, height being the channels."""
    return conv(x_NSHW.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)
