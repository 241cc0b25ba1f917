"""What the objectives on adapters have in common: one counted thing for each row that has a teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.adapters.output import AdaptedOutput, PredictedOutput
from limbeck.config.parts.objectives import ObjectiveOptions
from limbeck.errors import RunError
from limbeck.types import Batch, Output


class AdapterObjective:
    """Summed over the rows of a batch, each with an adapter of its own."""

    name: str

    def __init__(self, options: ObjectiveOptions):
        self.weight, self.schedule = options.weight_at(0), options.schedule

    def count(self, batch: Batch) -> Tensor:
        """Rows that are not padding."""
        return rows_that_count(batch).sum()

    def adapted(self, output: Output | AdaptedOutput | PredictedOutput) -> AdaptedOutput:
        """The output of a student that makes adapters; another student's is refused."""
        if not isinstance(output, AdaptedOutput):
            raise RunError(f"objective '{self.name}' is about generated adapters: its student needs the surgery 'lora_generator'")
        return output


def rows_that_count(batch: Batch) -> Tensor:
    """Bool ``[B]``."""
    if batch.adapters_B is None:
        return torch.zeros(len(batch.input_ids_BT), dtype=torch.bool, device=batch.input_ids_BT.device)
    return batch.adapters_B >= 0
