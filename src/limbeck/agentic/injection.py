"""The student run with generated LoRAs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from limbeck.adapters.inject import Injector
from limbeck.adapters.spec import Adapters, AdapterSpec

_HELD = "_limbeck_injector"
"""Attribute of a student that a LoRA has acted in."""


def student_forward_with_lora(student: Any, input_ids: Tensor, lora: Adapters) -> Tensor:
    """Logits ``[B, T, V]`` of right-padded rows ``input_ids [B, T]``, equal shares of them with each LoRA; gradients reach the LoRA.

    ``output = base_layer(x) + (x A^T) B^T * alpha / rank`` in every target, by products over the whole batch; what is behind a row's end (-1, or
    any id) is not seen by what stands before it.  The student's weights are not touched, and without a LoRA it is exactly what it was.  All of
    the logits exist at one time: :func:`~limbeck.agentic.train_step` and recipes do without them.

    Raises:
        AdapterError: a LoRA made for another model, or rows that cannot be shared out evenly.
    """
    with injector_of(student, lora.spec).active(lora):
        return student(input_ids=input_ids.clamp_min(0), attention_mask=None, use_cache=False).logits


def student_with_lora(student: Any) -> Callable[[Tensor, Adapters], Tensor]:
    """:func:`student_forward_with_lora` of one student: ``forward(input_ids, lora)``."""
    return partial(student_forward_with_lora, student)


def injector_of(student: Any, spec: AdapterSpec) -> Injector:
    """The student's place for LoRAs.  It stays: a backward pass that recomputes layers needs it after the forward is over."""
    held: Injector | None = getattr(student, _HELD, None)
    if held is None or set(held.spec.sites) != set(spec.sites):
        if held is not None:
            held.remove()
        held = Injector(student, spec)
        setattr(student, _HELD, held)
    return held
