"""Block formats of GGUF as bytes: ternary weights without loss, and the precisions that stand beside them.

Layouts are those of ggml (``ggml-common.h``): TQ1_0 and TQ2_0 hold one fp16 scale for 256 weights, Q2_0 one for 64, behind or before
their codes.  A finer scale cannot be held; a coarser one is repeated in each block.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from limbeck.config.parts.precision import types_for
from limbeck.errors import ModelError
from limbeck.ops.ternary import Ternary, dequantised

Weight: TypeAlias = Tensor | Ternary
"""What a file's tensor is made of: floats, or codes with their scales."""


class FileType(NamedTuple):
    """A GGUF tensor type: its name and number, weights and bytes a block, and the file's number when most weights have it."""

    name: str
    number: int
    block: int
    size: int
    file_type: int

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this type."""
        count = 1
        for side in shape:
            count *= side
        return count // self.block * self.size

    @property
    def bits(self) -> float:
        """Bits a weight, scales included."""
        return 8 * self.size / self.block


F32 = FileType("f32", 0, 1, 4, 0)
F16 = FileType("f16", 1, 1, 2, 1)
Q8_0 = FileType("q8_0", 8, 32, 34, 7)
BF16 = FileType("bf16", 30, 1, 2, 32)
TQ1_0 = FileType("tq1_0", 34, 256, 54, 36)
TQ2_0 = FileType("tq2_0", 35, 256, 66, 37)
Q2_0 = FileType("q2_0", 42, 64, 18, 41)
TYPES = {kind.name: kind for kind in (F32, F16, BF16, Q8_0, TQ1_0, TQ2_0, Q2_0)}
"""Types that are written, by name."""
TERNARY = (TQ2_0, TQ1_0, Q2_0)
"""Types that hold codes, best first on x86."""

_TRITS = np.array([81, 27, 9, 3, 1], dtype=np.uint16)
_TRIT_BYTES = ((0, 5, 32), (160, 5, 16), (240, 4, 4))
"""TQ1_0's three stretches of bytes: first weight, weights a byte, bytes (weights of a byte lie that many apart)."""


def obstacle(width: int, group: int, kind: FileType) -> str | None:
    """Why weights with ``width`` inputs and a scale for each ``group`` of them cannot be held by a type, or None."""
    if width % kind.block:
        return f"its {width} inputs are not a multiple of {kind.block}"
    if group != width and group % kind.block:
        return f"it has a scale for each {group} weights and {kind.name} one for {kind.block}"
    return None


def fitting(width: int, group: int) -> list[FileType]:
    """Ternary types that hold such weights without loss, best first on x86."""
    names = types_for(width, None if group == width else group)
    return [kind for kind in TERNARY if kind.name in names]


def check_fits(name: str, width: int, group: int, kind: FileType) -> None:
    """Raise :class:`ModelError` with the types that would hold the tensor, if ``kind`` does not."""
    why = obstacle(width, group, kind)
    if why is not None:
        others = [other.name for other in fitting(width, group)]
        way = f"use {' or '.join(others)}" if others else f"no ternary type holds it: keep it in {F16.name} (`--type auto`)"
        raise ModelError(f"{name}: {kind.name} cannot hold it: {why}; {way}")


def pack_ternary(weight: Ternary, kind: FileType, name: str = "tensor") -> np.ndarray:
    """Codes and scales as a ternary type's bytes, uint8 ``[*, O, bytes of a row]``.

    A block of zeros gets the scale zero, as ggml's own quantisation of such a block does.

    Raises:
        ModelError: the type cannot hold the width or the groups, a code is not -1, 0 or 1, or a scale is not an fp16 number.
    """
    codes, scales = weight.codes.numpy(), weight.scales.numpy()
    width = codes.shape[-1]
    check_fits(name, width, width // scales.shape[-1], kind)
    if codes.size and (codes.min() < -1 or codes.max() > 1):
        raise ModelError(f"{name}: holds codes other than -1, 0 and 1")
    halves = scales.astype(np.float16)
    if not np.array_equal(halves.astype(np.float32), scales):
        raise ModelError(f"{name}: a scale is no fp16 number: what is written would not be what was trained")
    codes_NB = codes.reshape(-1, kind.block)
    scales_N1 = np.repeat(halves.reshape(-1), width // scales.shape[-1] // kind.block)[:, None]
    scales_N1 = np.where(codes_NB.any(1, keepdims=True), np.abs(scales_N1), np.float16(0)).view(np.uint8)
    if scales.size and scales.min() < 0:
        raise ModelError(f"{name}: a scale is negative")
    digits_NB = (codes_NB + np.int8(1)).view(np.uint8)
    if kind is Q2_0:
        packed = np.concatenate([scales_N1, _four(digits_NB.reshape(-1, 16, 4).transpose(0, 2, 1))], 1)
    elif kind is TQ2_0:
        packed = np.concatenate([_four(digits_NB.reshape(-1, 4, 32)).reshape(len(codes_NB), 64), scales_N1], 1)
    else:
        packed = np.concatenate([*(_five(digits_NB, *stretch) for stretch in _TRIT_BYTES), scales_N1], 1)
    return packed.reshape(*codes.shape[:-1], -1)


def _four(digits_N4M: np.ndarray) -> np.ndarray:
    """Four digits in a byte, the first in the lowest bits, ``[N, M]``."""
    return digits_N4M[:, 0] | digits_N4M[:, 1] << 2 | digits_N4M[:, 2] << 4 | digits_N4M[:, 3] << 6


def _five(digits_NB: np.ndarray, start: int, count: int, width: int) -> np.ndarray:
    """Base-3 digits in a byte, the first most significant, scaled so that a multiplication reads them back: ceil(q 256 / 243)."""
    part = digits_NB[:, start : start + count * width].reshape(-1, count, width).astype(np.uint16)
    numbers = (part * _TRITS[:count, None]).sum(1, dtype=np.uint16)
    return ((numbers * np.uint16(256).astype(np.uint32) + 242) // 243).astype(np.uint8)


def pack_floats(weight: Tensor, kind: FileType) -> np.ndarray:
    """``weight [*, I]`` of floats as a type's bytes, uint8 ``[*, bytes of a row]``; values too large for fp16 are a
    :class:`ModelError`."""
    if kind is Q8_0:
        from gguf import GGMLQuantizationType, quants

        return quants.quantize(weight.float().numpy(), GGMLQuantizationType.Q8_0)
    dtype = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}[kind]
    cast = weight.to(dtype).contiguous()
    if kind is F16 and not torch.isfinite(cast).all():
        raise ModelError("a weight is beyond fp16's range: write bf16 or f32")
    return cast.view(torch.uint8).numpy()


def pack(weight: Weight, kind: FileType, name: str = "tensor") -> np.ndarray:
    """A weight as a type's bytes; codes in a float type are multiplied by their scales."""
    if isinstance(weight, Ternary):
        return pack_ternary(weight, kind, name) if kind in TERNARY else pack_floats(dequantised(weight), kind)
    return pack_floats(weight, kind)


def as_read(weight: Weight, kind: FileType) -> Tensor:
    """The fp32 numbers that a reader of the file finds."""
    if isinstance(weight, Ternary) and kind in TERNARY:
        return dequantised(weight)
    floats = dequantised(weight) if isinstance(weight, Ternary) else weight
    if kind is Q8_0:
        from gguf import GGMLQuantizationType, quants

        packed = pack_floats(floats, kind)
        return torch.from_numpy(quants.dequantize(packed, GGMLQuantizationType.Q8_0))
    return floats.to({F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}[kind]).float()
