"""Weights in {-1, 0, 1} times a scale, and activations in eight bits: what is computed with, trained through and exported.

A weight ``[*, O, I]`` is quantised in blocks that share one scale: a whole stack (``tensor``), one matrix of it (``expert``), a row
(``row``) or ``group`` neighbouring inputs of a row (``group``).  In a fused projection each of its ``parts`` (gate and up) counts as
a matrix of its own.  With the block's scale ``s`` rounded to float16, as files store it,

    code = clip(round(w / s), -1, 1)        value = s * code

* ``absmean``: ``s = mean |w|`` (BitNet b1.58, arXiv 2402.17764);
* ``twn``: the mean of the ``|w|`` above ``0.7 mean |w|`` (Ternary Weight Networks, arXiv 1605.04711);
* ``mse``: the scale with the least squared error, by Lloyd's iteration from ``twn``;
* ``elastic``: ``s = 2/3 a`` with a learnt ``a``, so that the values are {-2/3, 0, 2/3} a (ParetoQ, arXiv 2502.02631);
* ``exact``: ``s = max |w|``, which finds the codes of weights that are ternary already.

The sums are taken in float64: codes and scales then do not depend on the device or on how a tensor is cut, except within that
rounding of a float16 tie.  Quantising is **not idempotent** (but for ``exact``): ``mean |s T|`` is ``s`` times the share of non-zeros.

Shape legend: O out features, I in features, P blocks down the rows (parts, or O), G blocks along a row, E experts.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Granularity = Literal["tensor", "expert", "row", "group"]
Method = Literal["absmean", "twn", "mse", "elastic", "exact"]

SMALLEST = 1e-5
"""Least scale: that of a block of zeros, whose codes are 0."""
LARGEST = torch.finfo(torch.float16).max
TWN = 0.7
LLOYD_STEPS = 12
"""Steps of Lloyd's iteration; on normal, Laplace and outlier-ridden weights the error is then within 1e-4 of the least."""
REACH = 0.99
"""ParetoQ passes no gradient to weights beyond this multiple of ``a``."""
Q8_BLOCK = 256
_ROWS_ALONE = ("row", "group")


class Ternary(NamedTuple):
    """Codes and scales of a weight."""

    codes: Tensor
    """int8 in {-1, 0, 1}, ``[*, O, I]``."""
    scales: Tensor
    """float32, every value exactly a float16 one, ``[*, O, G]``: G groups of I / G inputs each (G = 1: one per row; the scales of
    tensors and experts are repeated for their rows)."""


def ternary(
    weight: Tensor, *, scale: Granularity, group: int | None, method: Method, learnt: Tensor | None = None, parts: int = 1
) -> Ternary:
    """Codes and scales of ``weight [*, O, I]``.

    ``group`` is the number of inputs to a scale (``scale="group"`` alone), ``learnt [*, P, G]`` the ``a`` of ``elastic`` (see
    :func:`scale_shape`), ``parts`` the equal pieces of the rows that count as matrices of their own.  Raises
    :class:`ValueError` for sizes that do not divide.
    """
    blocks, compact = _scaled(weight.detach(), scale, group, method, None if learnt is None else learnt.detach(), parts)
    codes = _codes(blocks, _spread(compact, blocks)).to(torch.int8).reshape(weight.shape)
    by_row = compact.float().repeat_interleave(weight.shape[-2] // compact.shape[-2], -2)
    return Ternary(codes, by_row.expand(*weight.shape[:-1], by_row.shape[-1]))


def dequantised(t: Ternary) -> Tensor:
    """``scales * codes``, float32 ``[*, O, I]``."""
    groups = t.scales.shape[-1]
    return (t.codes.unflatten(-1, (groups, -1)) * t.scales.unsqueeze(-1)).flatten(-2)


def fake_quant(
    weight: Tensor,
    *,
    scale: Granularity,
    group: int | None,
    method: Method,
    learnt: Tensor | None = None,
    parts: int = 1,
    mix: float = 1.0,
) -> Tensor:
    """``weight + mix * (quantised - weight)`` in the weight's dtype, with a gradient; arguments as of :func:`ternary`.

    At ``mix = 1`` it equals ``dequantised(ternary(weight, ...))`` bit for bit, at 0 the weight.  The gradient of the quantised
    weight passes through unchanged; with ``elastic`` it is masked where ``|w| > 0.99 a``, and ``a`` gets LSQ's (arXiv 1902.08153):
    that of ``a * level(w / a)`` with the rounding passed through, divided by the root of the number of weights in its block.
    """
    if mix == 0.0:
        return weight
    if method != "elastic":
        return _StraightThrough.apply(weight, scale, group, method, parts, mix)
    if learnt is None:
        raise ValueError("method 'elastic' needs its learnt scales")
    return _Elastic.apply(weight, learnt, scale, group, parts, mix)


def scale_shape(shape: tuple[int, ...], *, scale: Granularity, group: int | None, parts: int = 1) -> tuple[int, ...]:
    """Shape of one number a block for a weight of ``shape [*, O, I]``: ``[*, P, G]``, with ones for what shares a scale."""
    *stack, rows, width = shape
    if group is not None and width % group:
        raise ValueError(f"{width} inputs are no multiple of the group of {group}")
    if rows % parts:
        raise ValueError(f"{rows} rows do not split into {parts} parts")
    if scale in _ROWS_ALONE:
        return (*stack, rows, width // group if group is not None else 1)
    return (*([1] * len(stack) if scale == "tensor" else stack), parts, 1)


def elastic_start(weight: Tensor, *, scale: Granularity, group: int | None, parts: int = 1) -> Tensor:
    """The ``a`` of ``elastic`` (:func:`scale_shape`) of least squared error for ``weight [*, O, I]``, in its dtype: what a
    conversion starts from."""
    _, compact = _scaled(weight.detach(), scale, group, "mse", None, parts)
    return (1.5 * compact).to(weight.dtype)


def round_token(x: Tensor, mix: float = 1.0) -> Tensor:
    """Activations ``x [..., I]`` as 8-bit integers with one scale a token, ``max |x| / 127`` over the last dim; straight-through
    gradient.

    Computed in float32 (float64 for float64) and returned in the dtype of ``x``.
    """
    return _PassThrough.apply(x, _token_values, mix)


def round_q8_K(x: Tensor, mix: float = 1.0) -> Tensor:
    """Activations ``x [..., I]`` as llama.cpp rounds them before a product with TQ1_0 or TQ2_0: blocks of 256, a float32 scale
    each.

    ``q = round(x * (127 / m))`` with ``m`` the entry of largest magnitude, and ``x ~ q / (127 / m)``, all in float32, ties to even
    (``quantize_row_q8_K_ref`` of ggml, which carries the sign of ``m`` through both factors: it cancels).  Straight-through gradient.
    Raises :class:`ValueError` if the last dim is no multiple of 256.
    """
    if x.shape[-1] % Q8_BLOCK:
        raise ValueError(f"q8_K rounds blocks of {Q8_BLOCK} activations, and {x.shape[-1]} is no multiple")
    return _PassThrough.apply(x, _q8_values, mix)


# -- scales ---------------------------------------------------------------------------------------------------------------


def _scaled(
    weight: Tensor, scale: Granularity, group: int | None, method: Method, learnt: Tensor | None, parts: int
) -> tuple[Tensor, Tensor]:
    """The weight as blocks ``[*, P, rows of a block, G, group]`` and its float16 scales ``[*, P, G]`` in the weight's dtype."""
    shape = scale_shape(tuple(weight.shape), scale=scale, group=group, parts=parts)
    weight = weight if weight.dtype == torch.float64 else weight.float()
    blocks = weight.unflatten(-1, (shape[-1], -1)).unflatten(-3, (shape[-2], -1))
    # The stack shares a scale where the shape has ones for it.
    shared = tuple(dim for dim in range(weight.ndim - 2) if shape[dim] == 1 and scale == "tensor")
    dims = (*shared, blocks.ndim - 3, blocks.ndim - 1)
    if method == "elastic":
        if learnt is None:
            raise ValueError("method 'elastic' needs its learnt scales")
        if tuple(learnt.shape) != shape:
            raise ValueError(f"learnt scales have shape {tuple(learnt.shape)} and {shape} is needed for {scale} scales of {tuple(weight.shape)}")
        found = learnt.to(weight.dtype) * (2 / 3)
    else:
        found = _MEASURES[method](blocks, dims).reshape(shape)
    return blocks, found.clamp(SMALLEST, LARGEST).half().to(weight.dtype)


def _absmean(blocks: Tensor, dims: tuple[int, ...]) -> Tensor:
    total = torch.linalg.vector_norm(blocks, 1, dims, keepdim=True, dtype=torch.float64)
    return total / (blocks.numel() // total.numel())


def _mean_above(size: Tensor, bound: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Mean of the sizes above ``bound`` in each block, float64; the bound where there is none."""
    chosen = size > bound.to(size.dtype)
    number = chosen.sum(dims, keepdim=True)
    total = (size * chosen).sum(dims, keepdim=True, dtype=torch.float64)
    return torch.where(number > 0, total / number.clamp(min=1), bound)


def _twn(blocks: Tensor, dims: tuple[int, ...]) -> Tensor:
    return _mean_above(blocks.abs(), TWN * _absmean(blocks, dims), dims)


def _mse(blocks: Tensor, dims: tuple[int, ...]) -> Tensor:
    size, found = blocks.abs(), _twn(blocks, dims)
    for _ in range(LLOYD_STEPS):
        # The nearest of {0, s} changes at s / 2; given the choice, the best s is the mean of the chosen.
        found = _mean_above(size, found / 2, dims)
    return found


def _exact(blocks: Tensor, dims: tuple[int, ...]) -> Tensor:
    return blocks.abs().amax(dims, keepdim=True)


_MEASURES: dict[str, Any] = {"absmean": _absmean, "twn": _twn, "mse": _mse, "exact": _exact}


def _spread(compact: Tensor, blocks: Tensor) -> Tensor:
    """Scales ``[*, P, G]`` beside blocks ``[*, P, rows, G, group]``."""
    return compact.unsqueeze(-2).unsqueeze(-1)


def _codes(blocks: Tensor, scales: Tensor) -> Tensor:
    return (blocks / scales).round_().clamp_(-1, 1)


def _values(weight: Tensor, blocks: Tensor, compact: Tensor, mix: float) -> Tensor:
    spread = _spread(compact, blocks)
    quantised = _codes(blocks, spread).mul_(spread).reshape(weight.shape).to(weight.dtype)
    # Neither end may go through a sum, which bfloat16 would round.
    return quantised if mix == 1.0 else torch.lerp(weight, quantised, mix)


# -- gradients ------------------------------------------------------------------------------------------------------------


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Granularity, group: int | None, method: Method, parts: int, mix: float) -> Tensor:
        return _values(weight, *_scaled(weight, scale, group, method, None, parts), mix)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None, None, None, None, None


class _Elastic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, learnt: Tensor, scale: Granularity, group: int | None, parts: int, mix: float) -> Tensor:
        ctx.save_for_backward(weight, learnt)
        ctx.settings = scale, group, parts, mix
        return _values(weight, *_scaled(weight, scale, group, "elastic", learnt, parts), mix)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight, learnt = ctx.saved_tensors
        scale, group, parts, mix = ctx.settings
        blocks, compact = _scaled(weight, scale, group, "elastic", learnt, parts)
        spread = _spread(compact, blocks)
        codes = _codes(blocks, spread)
        ratio = blocks / (1.5 * spread)
        inside = ratio.abs() <= REACH
        incoming = gradients[0].to(blocks.dtype).reshape(blocks.shape)
        # d(a * level(w / a)) / da with the rounding passed through: level - w / a inside, the end level outside.
        slope = codes * (2 / 3) - torch.where(inside, ratio, 0.0)
        dims = [d for d in range(weight.ndim - 2) if learnt.shape[d] == 1 != weight.shape[d]] + [blocks.ndim - 3, blocks.ndim - 1]
        number = blocks.numel() / learnt.numel()
        to_learnt = (incoming * slope).sum(dims, keepdim=True).reshape(learnt.shape) * (mix / math.sqrt(number))
        to_weight = torch.where(inside, incoming, (1 - mix) * incoming)
        return to_weight.reshape(weight.shape).to(weight.dtype), to_learnt.to(learnt.dtype), None, None, None, None


class _PassThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Any, mix: float) -> Tensor:
        rounded = values(x).to(x.dtype)
        return rounded if mix == 1.0 else torch.lerp(x, rounded, mix)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None, None


def _token_values(x: Tensor) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    unit = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / 127
    return (x / unit).round().clamp(-128, 127) * unit


def _q8_values(x: Tensor) -> Tensor:
    blocks = x.float().unflatten(-1, (-1, Q8_BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    # A tensor, not a number: torch would divide a number by multiplying with the reciprocal, which rounds twice.
    factor = torch.full_like(largest, 127.0) / largest
    values = (blocks * factor).round().clamp(-127, 127) * (1.0 / factor)
    return torch.where(largest > 0, values, 0.0).flatten(-2)
