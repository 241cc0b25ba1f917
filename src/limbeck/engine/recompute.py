"""Activation checkpointing: keep a decoder layer's inputs, compute its activations again in the backward pass."""

from __future__ import annotations

from contextvars import copy_context
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def outer_units(student: nn.Module) -> list[nn.Module]:
    """The student's units that no other unit holds: its decoder layers (a mixer inside one is recomputed with it)."""
    units: list[nn.Module] = list(student.units())
    inside = {id(m) for u in units for m in u.modules() if m is not u}
    return [u for u in units if id(u) not in inside]


def recompute(unit: nn.Module) -> None:
    """Make a unit recompute.  Keyword inputs, which carry the packing, are kept as they are.

    It recomputes in the context variables of its first run: the backward pass may come after they were reset, or on a thread
    that never had them.
    """
    forward = unit.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        context = copy_context()

        def again(*args: Any, **kwargs: Any) -> Any:
            # A context can be entered once at a time, and units may be nested.
            return context.copy().run(forward, *args, **kwargs)

        return checkpoint(again, *args, use_reentrant=False, **kwargs)

    unit.forward = recomputed
