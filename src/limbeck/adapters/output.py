"""What a student that makes adapters hands to the objectives: the adapters, and the adapted model to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from limbeck.adapters.spec import Adapters
from limbeck.errors import AdapterError
from limbeck.types import Head

RunBase = Callable[[Tensor, Sequence[int], bool, Adapters | None], list[Tensor]]
"""``run(ids_BT, layers, final_norm, adapters)``: states ``[B, T, D]`` of right-padded rows, equal shares of them with each adapter."""


class AdaptedOutput:
    """An :class:`~limbeck.types.Output` whose hidden states are computed when an objective asks for them.

    Objectives on the adapters themselves, or on other text, never pay for the batch's.  ``adapters`` has one LoRA for each row.
    """

    def __init__(self, adapters: Adapters, head: Callable[[], Head], hidden: Callable[[], Tensor], run: RunBase):
        self.adapters = adapters
        self._head, self._hidden = head, hidden
        self.run = run

    @cached_property
    def hidden_BTD(self) -> Tensor:
        """Final hidden states of the batch's rows, each with its adapter."""
        return self._hidden()

    @cached_property
    def head(self) -> Head:
        """The base's output projection."""
        return self._head()


@dataclass(frozen=True)
class PredictedOutput:
    """What a student that predicts deltas gives: F numbers for each row, ``[B, F]``.  No model runs with it."""

    delta_BF: Tensor

    @property
    def checksum(self) -> Tensor:
        """A number that says which weights made this, where there is no text to score."""
        return self.delta_BF.float().square().sum()

    @property
    def hidden_BTD(self) -> Tensor:
        """There are none: an objective that asks for them is refused."""
        raise AdapterError("this student predicts deltas and runs no model, so there is no text to judge: its objective is `delta`")

    @property
    def head(self) -> Head:
        """As there are no hidden states."""
        raise AdapterError("this student predicts deltas and runs no model, so it has no output head: its objective is `delta`")
