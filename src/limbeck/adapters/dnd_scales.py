"""How a DnD token says what its weights were divided by: two numbers, written again and again along its last two rows and columns.

Both codes take the mean and the standard deviation of a token's weights and give what to subtract, what to divide by, and the two
numbers for the border; and read them back.  The last dimension of ``codes`` is (mean code, deviation code).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Scales(Protocol):
    """A scale code.  ``mean [...]`` and ``std [...]`` are of one shape, at least fp32."""

    nan_is_constant: bool
    """Whether NaN among a token's weights reads back as the token's mean."""

    def encode(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(codes [..., 2], shift, scale)``: the weights become ``(w - shift) / scale``, or zeros where ``scale`` is zero."""
        ...

    def decode(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """``(shift, scale)``, ``[...]`` each, from ``codes [..., 2 rows, 2]``, those of the border's two rows."""
        ...


class LegacyScales:
    """DnD's own code: ``8 mean`` and ``log(0.9 std + 0.1) + 1.6``.

    The 0.1 makes it nearly flat for small deviations: a code that is off by 0.01 is a deviation that is off by 7 % at 2e-2 and by
    1100 % at 1e-4, and a code below -0.703 reads as a negative one.  Right for reading and writing DnD's tokens, wrong for the rest.

    DnD divides the zeros of a fresh B by their deviation of zero and keeps NaN.  Here such a token is written as zeros, which DnD reads
    back as the token's mean; and NaN, which only DnD wrote, is read so too.
    """

    nan_is_constant = True
    mean_factor, std_factor, std_floor, std_offset = 8.0, 0.9, 0.1, 1.6

    def encode(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`Scales`."""
        code = (self.std_factor * std + self.std_floor).log() + self.std_offset
        return torch.stack([self.mean_factor * mean, code], dim=-1), mean, std

    def decode(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Scales`; the two rows are read apart and then averaged, as DnD does."""
        mean, code = codes.unbind(-1)
        std = ((code - self.std_offset).exp() - self.std_floor) / self.std_factor
        return mean.mean(-1) / self.mean_factor, std.mean(-1)


class ExactScales:
    """A code for every size of weights: ``(log2(scale) + 7) / 4`` and ``mean / scale``, both rounded to what bf16 can hold.

    It differs from DnD's in four ways, each for a defect of that:

    * No floor in the logarithm.  A code that is off by 0.01 is a scale off by 2.8 % at *every* size, and no code reads as a negative one.
      Zero is where weights of the usual size (2^-7) are.
    * The weights are divided by the scale *as it will be read*, after rounding.  So neither bf16 tokens nor the logarithm cost any
      precision in the scale; the deviation of the divided weights is 1 to within 2 %.
    * The mean is in units of the scale: it keeps its digits at every size.
    * The scale is at least ``|mean| / 8``, so that nearly constant weights neither divide by nothing nor need a mean code beyond bf16's
      reach, and at least 2^-39, whose code -8 stands for zero: the weights of a zero token are zeros, and read back as exactly zero.
    """

    nan_is_constant = False
    centre, octaves, lowest, largest_mean = 7.0, 4.0, -8.0, 8.0

    def encode(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`Scales`."""
        wanted = torch.maximum(std, mean.abs() / self.largest_mean)
        code = _as_bf16(((wanted.log2() + self.centre) / self.octaves).clamp_min(self.lowest))
        scale = self._scale(code)
        mean_code = _as_bf16(mean / scale)
        return torch.stack([mean_code, code], dim=-1), mean_code * scale, scale

    def decode(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Scales`."""
        mean_code, code = codes.mean(-2).unbind(-1)
        scale = self._scale(code)
        return mean_code * scale, scale

    def _scale(self, code: Tensor) -> Tensor:
        return (code * self.octaves - self.centre).exp2()


def _as_bf16(values: Tensor) -> Tensor:
    return values.bfloat16().to(values.dtype)
