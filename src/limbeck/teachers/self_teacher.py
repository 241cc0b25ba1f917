"""The student's own base as its teacher: every attention layer's input and output, one layer at a time.

The frozen base runs unchanged, so every layer sees the activations of the original model; the visitor is called inside the
layer's forward hook and whatever graph it builds is gone when it returns.  Memory is one layer's, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.config.parts.teachers import SelfTeacherOptions
from limbeck.models.packed import forward_packed
from limbeck.models.structure import attention_slot, decoder_layers
from limbeck.needs import Need
from limbeck.teachers.frozen import FrozenModel
from limbeck.types import Batch, Signal, Visit


class SelfTeacher(FrozenModel):
    """Streams attention (need :class:`~limbeck.needs.AttentionStream`)."""

    def __init__(self, options: SelfTeacherOptions, source: str, revision: str | None = None):
        super().__init__(source, revision=revision)

    def signal(self, batch: Batch, needs: Mapping[type[Need], Need]) -> Signal:
        """Nothing is answered by value: a signal with every layer's activations would be L x T x 2D."""
        return Signal()

    @torch.no_grad()
    def stream(self, batch: Batch, visit: Visit) -> None:
        """Run the base once and call ``visit(layer, inputs_BTD, outputs_BTD, kwargs)`` at each attention module."""
        handles = []
        for index, layer in enumerate(decoder_layers(self.model)):
            attention = getattr(layer, attention_slot(layer))
            handles.append(attention.register_forward_hook(_visitor(index, visit), with_kwargs=True))
        try:
            forward_packed(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()


def _visitor(index: int, visit: Visit) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        rest = dict(kwargs)
        inputs: Tensor = args[0] if args else rest.pop("hidden_states")
        outputs: Tensor = output[0] if isinstance(output, tuple) else output
        visit(index, inputs.detach(), outputs.detach(), rest)

    return hook
