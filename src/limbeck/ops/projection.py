"""A head made ready to be applied to chunks of hidden states: vocabulary, dtype, soft-cap, temperature.

Shape legend: n tokens, D width, V vocabulary, K kept ids, C columns (V, or K ids of each row's own).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from limbeck.errors import ModelError
from limbeck.types import Head


class Projection(NamedTuple):
    """A head made ready: cut to the common vocabulary, in the dtype of its products."""

    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None
    scale: float
    hidden_V: Tensor | None
    """True for ids without probability."""
    temperature: float
    accumulate: torch.dtype


def whole_head(head: Head) -> Head:
    """The head with whole, plain tensors.

    Every rank holds a part of a sharded weight and uses all of it for its own tokens, so each rank's gradient is a partial sum.
    """

    def whole(x: Tensor | None) -> Tensor | None:
        return x.full_tensor(grad_placements=[Partial()] * x.device_mesh.ndim) if isinstance(x, DTensor) else x

    weight_VD = whole(head.weight_VD)
    assert weight_VD is not None
    return Head(weight_VD, whole(head.bias_V), head.softcap, head.scale, head.vocab_mask_V)


def common_vocabulary(heads: list[Head]) -> tuple[int, Tensor | None]:
    """``(width, mask)``: the ids below ``width`` of which every head has those in ``mask`` (all of them if None)."""
    width = min(head.weight_VD.shape[0] for head in heads)
    common_V: Tensor | None = None
    for head in heads:
        rows, mask_V = head.weight_VD.shape[0], head.vocab_mask_V
        beyond = rows - width if mask_V is None else int(mask_V[width:].sum())
        if beyond:
            raise ModelError(
                f"head: {beyond} ids from {width} on exist on one side only (widths {[h.weight_VD.shape[0] for h in heads]}); "
                "distributions over different vocabularies are not compared: if these rows are padding, mask them in vocab_mask_V"
            )
        if mask_V is not None:
            common_V = mask_V[:width] if common_V is None else common_V & mask_V[:width]
    if common_V is None:
        return width, None
    ids = common_V.nonzero()
    if not ids.numel():
        raise ModelError("head: vocab_mask_V leaves no id that exists; a mask is True for the ids of the tokenizer")
    # A padded tail is cut off, which is cheaper than masking it.
    width = int(ids[-1]) + 1
    return width, None if ids.numel() == width else common_V[:width]


def chunk_for(device: torch.device) -> int:
    """Tokens whose logits exist at one time when nobody says how many.

    On a CPU 128: for vocabularies of 4,096 to 151,936 within a sixth of the fastest of 16 to 1024, where the gradient of the
    head, read and written once a chunk, weighs against what the cache holds.  Elsewhere 1024, which fills the device.
    """
    return 128 if device.type == "cpu" else 1024


def accumulate_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of sums and of the softmax for ``hidden [..., D]`` and ``weight [V, D]``."""
    return torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32


def project_with(hidden: Tensor, head: Head, width: int, mask_V: Tensor | None, temperature: float) -> Projection:
    """The head (whole: :func:`whole_head`) in the dtype in which ``hidden [..., D]`` times its weight would be computed here."""
    device = hidden.device.type
    accumulate = accumulate_dtype(hidden, head.weight_VD)
    dtype = torch.promote_types(hidden.dtype, head.weight_VD.dtype)
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    bias_V = None if head.bias_V is None else head.bias_V.detach()[:width].to(accumulate)
    hidden_V = None if mask_V is None else ~mask_V
    weight_VD = head.weight_VD.detach()[:width].to(dtype)
    return Projection(weight_VD, bias_V, head.softcap, head.scale, hidden_V, temperature, accumulate)


def logits_of(hidden_nD: Tensor, head: Projection, ids_nK: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Tempered logits ``[n, C]`` of every id (or of ``ids_nK`` alone) and, with a soft-cap, its slope there."""
    hidden_nD = hidden_nD.to(head.weight_VD.dtype)
    with torch.autocast(hidden_nD.device.type, enabled=False):
        if ids_nK is None:
            logits_nC = (hidden_nD @ head.weight_VD.mT).to(head.accumulate)
        else:
            logits_nC = torch.bmm(head.weight_VD[ids_nK], hidden_nD[:, :, None]).squeeze(2).to(head.accumulate)
    if head.bias_V is not None:
        logits_nC.add_(head.bias_V if ids_nK is None else head.bias_V[ids_nK])
    slope_nC = None
    factor = head.scale / head.temperature
    if head.softcap is not None:
        logits_nC.mul_(head.scale / head.softcap).tanh_()
        slope_nC = 1 - logits_nC.square()
        factor = head.softcap / head.temperature
    if factor != 1:
        logits_nC.mul_(factor)
    if head.hidden_V is not None:
        # Finite: the difference of two such logits is 0, where -inf - -inf would be NaN.
        absent = head.hidden_V if ids_nK is None else head.hidden_V[ids_nK]
        logits_nC.masked_fill_(absent, torch.finfo(logits_nC.dtype).min / 4)
    return logits_nC, slope_nC


def whole_logits(hidden_nD: Tensor, head: Head) -> Tensor:
    """Logits ``[n, V]`` of a few rows: for what needs all of them at once, such as sampling."""
    width, mask_V = common_vocabulary([head])
    return logits_of(hidden_nD, project_with(hidden_nD, whole_head(head), width, mask_V, 1.0))[0]


def next_log_probabilities(hidden_MTD: Tensor, head: Head, ids_MT: Tensor) -> Tensor:
    """Log-probability ``[M, T - 1]`` of every next token of M rows, one row's logits at a time."""
    rows = zip(hidden_MTD, ids_MT, strict=True)
    return torch.stack([whole_logits(h[:-1], head).log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1) for h, ids in rows])


def shift(logits_nC: Tensor) -> Tensor:
    """Subtract each row's maximum in place; returns where it stood."""
    top, where = logits_nC.max(1, keepdim=True)
    logits_nC.sub_(top)
    return where.squeeze(1)


def exponentiate(shifted_nC: Tensor) -> Tensor:
    """Logits with maximum 0 -> probabilities, in place; returns the row sums ``[n, 1]`` of the exponentials."""
    total = shifted_nC.exp_().sum(1, keepdim=True)
    shifted_nC.div_(total)
    return total
