"""Which of many adapters is nearest to what is wanted: cosine in a space of behaviour, such as that of delta activations."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from limbeck.errors import AdapterError

Array = TypeVar("Array", Tensor, np.ndarray)


def retrieve(query: Array, keys: Array, k: int, temperature: float = 0.1) -> tuple[Array, Array]:
    """The k keys of largest cosine to each query, largest first, and the softmax of ``cosine / temperature`` over them.

    Args:
        query: ``[D]`` or ``[M, D]``.
        keys: ``[N, D]``, one a pool adapter.  A key of norm zero (an adapter that does nothing) has no direction: it comes last, with
            weight zero.
        k: at most N.
        temperature: above 0; small, and only the nearest counts.

    Returns:
        ``indices [k]`` or ``[M, k]`` (int64; of equal cosines the lower index first) and ``weights`` of the same shape, which sum
        to 1.  A query of norm zero has equal weights over the first k.  NumPy in, NumPy out.

    Raises:
        AdapterError: sizes that do not fit, k or temperature out of range, numbers that are not finite, only zero keys.
    """
    if isinstance(query, np.ndarray):
        indices, weights = _retrieve(torch.from_numpy(query), torch.as_tensor(keys), k, temperature)
        return indices.numpy(), weights.numpy()
    return _retrieve(query, keys, k, temperature)


def nearest(query: Array, keys: Array) -> Array:
    """The index in ``keys [N, D]`` of largest cosine: ``[]`` for a ``query [D]``, ``[M]`` for ``[M, D]``."""
    return retrieve(query, keys, 1)[0][..., 0]


def _retrieve(query: Tensor, keys: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    _check(query, keys, k, temperature)
    q, K = _unit(query), _unit(keys)
    cosines = (q @ K.mT).masked_fill(K.abs().amax(-1) == 0, -torch.inf)
    order = torch.sort(cosines, dim=-1, descending=True, stable=True)
    return order.indices[..., :k], torch.softmax(order.values[..., :k] / temperature, -1)


def _unit(rows: Tensor) -> Tensor:
    """Rows of norm one; zero rows stay zero, and tiny ones do not underflow on the way."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    largest = wide.abs().amax(-1, keepdim=True)
    scaled = wide / torch.where(largest > 0, largest, 1)
    return scaled / scaled.norm(dim=-1, keepdim=True).clamp_min(1)


def _check(query: Tensor, keys: Tensor, k: int, temperature: float) -> None:
    if keys.ndim != 2 or query.ndim not in (1, 2) or query.shape[-1] != keys.shape[-1]:
        raise AdapterError(f"a query {list(query.shape)} cannot be compared with keys {list(keys.shape)}: wanted [D] or [M, D], and [N, D]")
    if not 1 <= k <= len(keys):
        raise AdapterError(f"k is {k}, and there are {len(keys)} adapters to retrieve from: 1 to {len(keys)} are possible")
    if not temperature > 0:
        raise AdapterError(f"temperature is {temperature:g}, and must be above 0")
    for what, rows in (("query", query), ("keys", keys)):
        if not rows.isfinite().all():
            raise AdapterError(f"the {what} hold numbers that are not finite: leave out the adapter that is broken")
    if not keys.any():
        raise AdapterError("all keys are zero, since none of these adapters does anything: name adapters that were trained")
