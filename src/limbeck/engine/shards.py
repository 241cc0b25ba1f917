"""Parameters that may be spread over ranks, for the optimisers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


def local(tensor: Any) -> Tensor:
    """What this rank holds of a tensor: the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def holds_whole_matrices(tensor: Tensor) -> bool:
    """Whether this rank's part of ``tensor [..., O, I]`` consists of whole matrices: stacked experts are cut between experts."""
    if not isinstance(tensor, DTensor):
        return True
    return all(
        isinstance(placement, Replicate) or (isinstance(placement, Shard) and placement.dim < tensor.ndim - 2)
        for placement in tensor.placements
    )


def like_shard(whole: Tensor, like: DTensor) -> Tensor:
    """This rank's part of ``whole`` (any shape), which every rank holds, cut as ``like`` is; nothing is sent."""
    mesh = like.device_mesh
    held = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return held.redistribute(placements=like.placements).to_local()


def gathered(part: Tensor, like: DTensor) -> Tensor:
    """The whole of a tensor of any shape of which this rank holds ``part``, cut as ``like`` is; every rank must call it."""
    spread = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=torch.Size(like.shape), stride=_strides(like.shape)
    )
    return spread.full_tensor()


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(torch.empty(shape, device="meta").stride())
