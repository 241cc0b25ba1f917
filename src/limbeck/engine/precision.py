"""Compute dtype.  Trained parameters stay float32 (float64 in checks); a model is never cast as a whole."""

from __future__ import annotations

import contextlib

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context that forwards run in: bfloat16 autocast, or nothing for float32 and float64."""
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def sharded_policy(precision: str) -> MixedPrecisionPolicy:
    """What sharded parameters are gathered as, and in which dtype gradients are reduced.

    Inputs are never cast: batches hold ids, and mixers say themselves what must stay float32.
    """
    if precision == "bfloat16":
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    return MixedPrecisionPolicy(cast_forward_inputs=False)
