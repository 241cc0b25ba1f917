"""Running a base with adapters in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from limbeck.adapters.inject import Injector
from limbeck.adapters.output import RunBase
from limbeck.adapters.spec import Adapters
from limbeck.models.hidden import hidden_states


def runner(model: Any, injector: Injector | None = None) -> RunBase:
    """``run(ids_BT, layers, final_norm, adapters)``: see :data:`limbeck.adapters.output.RunBase`.  Without an injector, the model as it is."""

    def run(ids_BT: Tensor, layers: Sequence[int], final_norm: bool, adapters: Adapters | None) -> list[Tensor]:
        if injector is None:
            return hidden_states(model, ids_BT, layers, final_norm=final_norm)
        with injector.active(adapters):
            return hidden_states(model, ids_BT, layers, final_norm=final_norm)

    return run
