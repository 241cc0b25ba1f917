"""Predicts the delta of a condition's adapter, for retrieval: no LoRA is generated.

Shape legend: N conditions, S texts of each, C tokens of a text, D width of the states, F numbers of a delta.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.adapters.output import PredictedOutput
from limbeck.config.parts.surgeries import DeltaPredictorOptions
from limbeck.errors import ModelError
from limbeck.students.generator.blocks import MLP, ConditionReader, full_precision
from limbeck.students.generator.student import ConditionedStudent
from limbeck.types import Batch

LARGEST = 2**17
"""Numbers of a delta that are still predicted one by one."""


class DeltaHead(nn.Module):
    """``(states [N, S, C, D], mask [N, S, C]) -> deltas [N, F]``: the mean of the known deltas, and what the condition adds."""

    def __init__(self, state_size: int, options: DeltaPredictorOptions, size: int):
        super().__init__()
        self.reader = ConditionReader(state_size, options.width, options.reader)
        self.mlp = MLP(options.width)
        self.norm = nn.LayerNorm(options.width)
        self.out = nn.Linear(options.width, size)
        self.register_buffer("centre_F", torch.zeros(size))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def begin_at(self, deltas_NF: Tensor) -> None:
        """Take mean and spread of the deltas that will be matched, so that the network works with numbers near one."""
        self.centre_F.copy_(deltas_NF.mean(0))
        self.scale.copy_((deltas_NF - deltas_NF.mean(0)).square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny))

    def forward(self, states_NSCD: Tensor, mask_NSC: Tensor) -> Tensor:
        """fp32 ``[N, F]``."""
        with full_precision(states_NSCD.device):
            z = self.reader(states_NSCD, mask_NSC).mean(1)
            return self.centre_F + self.scale * self.out(self.norm(z + self.mlp(z)))


class DeltaPredictor(ConditionedStudent):
    """Reads each row's condition and predicts the delta embedding ``[F]`` of its adapter."""

    def __init__(self, model: Any, options: DeltaPredictorOptions, *, size: int, **facts: Any):
        """``size`` is F, of the deltas that were measured; ``facts`` are those of :class:`ConditionedStudent`."""
        super().__init__(model, options, **facts)
        if size > LARGEST:
            raise ModelError(
                f"surgery.delta_predictor: the measured deltas have {size:,} numbers, at most {LARGEST:,} can be predicted: set `tokens: mean` or a "
                "`projection` in the representation of the measure_deltas stage"
            )
        self.options, self.size = options, size
        self.head = DeltaHead(self.states.size, options, size)

    @property
    def trained(self) -> nn.Module:
        """The network."""
        return self.head

    def facts(self) -> dict[str, Any]:
        """Options and the length of a delta."""
        return {"options": self.options.model_dump(mode="json", by_alias=True), "size": self.size}

    def forward(self, batch: Batch) -> PredictedOutput:
        """A delta for each row."""
        return PredictedOutput(self.head(*self.read(batch)))

    def predict(self, condition_NSC: Tensor) -> Tensor:
        """The delta ``[N, F]`` of each condition: S texts of at most C token ids, padded with -1."""
        return self.head(*self.states(condition_NSC))
