"""Attention alignment: each mixer reproduces its layer's attention output from the teacher's own input.

The default loss is ``relative_mse``: ``sum_tokens |t - s|^2 / P_l`` with ``P_l`` the layer's mean teacher power a token, measured
once on calibration batches.  A ratio of batch statistics would not be additive over micro-batches and ranks; a stored
denominator is.  The exact ratio of the logged step is reported as ``residual/<layer>``.  ``mse`` is the mean over the width,
``rms`` the reference repository's (fla-org/hybrid-distillation) un-squared root mean square of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.config.parts.objectives import AttentionAlignmentOptions
from limbeck.types import Batch, LossTerm, Output, Signal, Visit


class AttentionAlignment:
    """Streams: its pieces (one mixer each) have disjoint graphs and are backpropagated where they are made."""

    name = "attention_alignment"

    def __init__(self, options: AttentionAlignmentOptions):
        self.weight, self.schedule = options.weight_at(0), options.schedule
        self.loss = options.loss
        self.calibration_batches = options.calibration_batches if options.loss == "relative_mse" else 0
        self._power: dict[int, Tensor] = {}

    def count(self, batch: Batch) -> Tensor:
        """Real tokens: every position has an attention output, whether its prediction counts or not."""
        return batch.token_mask_BT.sum()

    def calibrate(self, stream: Callable[[Batch, Visit], None], batches: Iterable[Batch]) -> None:
        """Measure each layer's mean teacher power a token, ``E_t |t|^2`` (fp32 scalars)."""
        totals: dict[int, Tensor] = {}
        tokens = 0
        for batch in batches:
            mask_BT = batch.token_mask_BT

            def visit(
                layer: int, inputs_BTD: Tensor, outputs_BTD: Tensor, kwargs: dict[str, Any], mask_BT: Tensor = mask_BT
            ) -> None:
                power = _wide(outputs_BTD[mask_BT]).square().sum()
                totals[layer] = totals.get(layer, torch.zeros_like(power)) + power

            stream(batch, visit)
            tokens += int(mask_BT.sum())
        self._power = {layer: (total / max(tokens, 1)).clamp_min(1e-12) for layer, total in totals.items()}

    def state(self) -> dict[str, Tensor]:
        """The stored denominators: they belong to the checkpoint, so that a resumed run has the same loss."""
        return {str(layer): power for layer, power in self._power.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take the denominators of a checkpoint: ``state`` is of scalars by layer, as :meth:`state` gave it."""
        self._power = {int(layer): power for layer, power in state.items()}

    def piece(
        self, mixer: nn.Module, layer: int, inputs_BTD: Tensor, outputs_BTD: Tensor, kwargs: dict[str, Any], batch: Batch
    ) -> LossTerm:
        """One layer's summed loss, with the graph of its mixer alone."""
        student_BTD = mixer(inputs_BTD, **kwargs)[0]
        mask_BT = batch.token_mask_BT
        # Padding is dropped by a product, not by indexing: the rows' shapes stay those of the batch.
        error_BT = (_wide(student_BTD) - _wide(outputs_BTD)).square().sum(-1) * mask_BT
        power = (_wide(outputs_BTD).square().sum(-1) * mask_BT).sum()
        error = error_BT.sum()
        if self.loss == "relative_mse":
            total = error / self._power[layer].to(error.device)
        elif self.loss == "mse":
            total = error / outputs_BTD.shape[-1]
        else:
            # The root's slope is infinite at zero error, where padding sits: it is moved off zero before the mask.
            per_token = (error_BT / outputs_BTD.shape[-1] + 1e-12).sqrt()
            total = (per_token * mask_BT).sum()
        return LossTerm(total, {f"residual/{layer}": (error.detach(), power)})

    def __call__(self, output: Output, signal: Signal, batch: Batch) -> LossTerm:
        """Alignment never sees a whole model's output; the streaming step calls :meth:`piece`."""
        raise TypeError("attention_alignment streams layer by layer: it runs in a streaming train step")


def _wide(x: Tensor) -> Tensor:
    """At least fp32: bf16 activations are compared in fp32, fp64 ones as they are."""
    return x if x.dtype == torch.float64 else x.float()
