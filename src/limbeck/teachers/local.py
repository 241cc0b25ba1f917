"""A frozen model in this process: final hidden states and the head, never logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from limbeck.config.parts.teachers import LocalTeacherOptions
from limbeck.models.head import head_of
from limbeck.models.packed import forward_packed
from limbeck.needs import HeadHidden, Need
from limbeck.teachers.frozen import FrozenModel
from limbeck.types import Batch, Output, Signal, Visit


class LocalTeacher(FrozenModel):
    """Answers :class:`HeadHidden`; the fused divergences take it from there."""

    def __init__(self, options: LocalTeacherOptions, source: str):
        super().__init__(source, dtype=options.dtype, attention=options.attention, revision=options.revision)

    @torch.no_grad()
    def signal(self, batch: Batch, needs: Mapping[type[Need], Need]) -> Signal:
        """``signal[HeadHidden]`` is ``Output(hidden_BTD, head)``."""
        signal = Signal()
        if HeadHidden in needs:
            signal[HeadHidden] = Output(forward_packed(self.model, batch), head_of(self.model))
        return signal

    def stream(self, batch: Batch, visit: Visit) -> None:
        """A local teacher does not stream; its options say so before anything is loaded."""
        raise TypeError("teacher 'local' does not stream attention: use teacher 'self'")
