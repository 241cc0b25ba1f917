"""What a tensor goes through on its way into a file: rows and columns in another order, for floats and for codes with their scales."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.errors import ModelError
from limbeck.export.gguf.packing import Weight
from limbeck.ops.ternary import Ternary


def rows(weight: Weight, index: Tensor) -> Weight:
    """The rows ``index [O]`` of ``weight [*, O, I]`` (entries of a vector); scales travel with their rows."""
    if isinstance(weight, Ternary):
        return Ternary(weight.codes.index_select(-2, index), weight.scales.index_select(-2, index))
    return weight.index_select(0 if weight.ndim == 1 else -2, index)


def columns(weight: Weight, index: Tensor, name: str = "tensor") -> Weight:
    """The columns ``index [I]`` of ``weight [*, O, I]``; groups that share a scale must move as wholes, else
    :class:`ModelError`."""
    if not isinstance(weight, Ternary):
        return weight.index_select(-1, index)
    groups = weight.scales.shape[-1]
    if groups == 1:
        return Ternary(weight.codes.index_select(-1, index), weight.scales)
    width = weight.codes.shape[-1] // groups
    moved = index.unflatten(0, (groups, width))
    if not torch.equal(moved, moved[:, :1] + torch.arange(width)) or (moved[:, 0] % width).any():
        raise ModelError(
            f"{name}: llama.cpp wants its columns in an order that tears groups of {width} apart: train it with `scale: row`, or keep "
            "it out of the ternary plan"
        )
    return Ternary(weight.codes.index_select(-1, index), weight.scales.index_select(-1, moved[:, 0] // width))


def half(weight: Weight, which: int) -> Weight:
    """The first or second half of the rows of ``[*, 2 O, I]``: gate and up."""
    parts = weight if isinstance(weight, Ternary) else (weight,)
    chosen = [part.chunk(2, -2)[which] for part in parts]
    return Ternary(*chosen) if isinstance(weight, Ternary) else chosen[0]


def floats(weight: Weight, name: str) -> Tensor:
    """A weight that must be floats, in fp32."""
    if isinstance(weight, Ternary):
        raise ModelError(f"{name}: llama.cpp has no ternary form of it: keep it out of the plan")
    return weight.float()


def rotary_rows(heads: int, width: int) -> Tensor:
    """Rows of a Llama query or key projection, from transformers' halves to llama.cpp's neighbouring pairs."""
    return torch.arange(heads * width).reshape(heads, 2, width // 2).transpose(1, 2).flatten()


def tiled_heads(key_heads: int, value_heads: int, width: int) -> Tensor:
    """Rows of value heads from grouped by key head (k0v0, k0v1, ...) to tiled (k0v0, k1v0, ..., k0v1, ...), as ggml broadcasts."""
    return torch.arange(value_heads * width).reshape(key_heads, value_heads // key_heads, width).transpose(0, 1).flatten()


def regrouped(key_heads: int, key_width: int, value_heads: int, value_width: int) -> tuple[Tensor, Tensor]:
    """Rows of Qwen3-Next's ``in_proj_qkvz``, where each key head has its q, k, v, z: those of q|k|v over all heads, and those of z."""
    values = value_heads // key_heads * value_width
    sizes = [key_width, key_width, values, values]
    index = torch.arange(key_heads * sum(sizes)).reshape(key_heads, -1)
    q, k, v, z = (part.flatten() for part in index.split(sizes, 1))
    return torch.cat([q, k, v]), z
