"""Calibration of fresh mixers before their first step: what the attention does on a few rows of text sets forget rates and scales.

Two passes of the frozen base, one layer at a time in its hooks:

1. how far back each head looks (:mod:`limbeck.ops.attention_reach`), from queries and keys made again of the layer's input, block by
   block; each mixer takes from it what it can use (:meth:`Mixer.calibrate`: a head that looks ``d`` tokens back gets half-life ``d``);
2. the scale of every head of the mixers that this made, by least squares against the attention's output: for all heads of a layer
   together, as their contributions overlap, and within :data:`BOUNDS`.

After Taylor-Calibrate (arXiv 2606.16429), which fits one head at a time and also sets the write strengths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.models.structure import AttentionView, Rotary
from limbeck.ops.attention_reach import Reach, attention_reach, bounded_gains, head_products
from limbeck.students.mixers.base import Measured, Mixer
from limbeck.types import Batch, Visit

BOUNDS = (0.1, 10.0)
"""Of a head's scale."""

Stream = Callable[[Batch, Visit], None]
"""Runs the base once and visits its attention layers."""


@dataclass(frozen=True)
class LayerRecord:
    """What was found for one layer; plain numbers, so that it is kept in a file and brings the same values back."""

    distance: list[float] | None
    """Mean distance in tokens that each head looks back; None where the family's rotation is not known."""
    gain: list[float]
    """Scale of each head of the mixer."""
    residual: tuple[float, float]
    """Squared error over the attention's power on the rows, of the fresh mixer and of the calibrated one."""

    @property
    def measured(self) -> Measured | None:
        """What a mixer takes."""
        return None if self.distance is None else Measured(torch.tensor(self.distance, dtype=torch.float64))


def measure(mixers: Mapping[int, Mixer], views: Mapping[int, AttentionView], stream: Stream, batches: Sequence[Batch]) -> dict[int, LayerRecord]:
    """Measure the layers whose mixer has heads to scale.  The mixers are left with the measured rates set, and unscaled."""
    mixers = {layer: mixer for layer, mixer in mixers.items() if mixer.read_out is not None}
    reaches, fresh = _pass(mixers, views, stream, batches)
    measured: dict[int, Measured] = {}
    for layer, reach in reaches.items():
        measured[layer] = Measured(reach.mean().cpu())
        mixers[layer].calibrate(measured[layer])
    _, calibrated = _pass(mixers, {}, stream, batches)
    records = {}
    for layer, fit in calibrated.items():
        gain_H = bounded_gains(fit.gram_HH, fit.cross_H, BOUNDS)
        found = measured.get(layer)
        records[layer] = LayerRecord(
            distance=None if found is None else found.distance_H.tolist(),
            gain=gain_H.tolist(),
            residual=(fresh[layer].residual(torch.ones_like(gain_H)), fit.residual(gain_H)),
        )
    return records


def apply(mixers: Mapping[int, Mixer], records: Mapping[int, LayerRecord]) -> dict[int, list[str]]:
    """Set a fresh student's mixers to what was found; returns the names of the tensors that were set, by layer."""
    names = {}
    for layer, record in records.items():
        mixer, measured = mixers[layer], record.measured
        names[layer] = [] if measured is None else mixer.calibrate(measured)
        names[layer] += mixer.scale_heads(torch.tensor(record.gain, dtype=torch.float64))
    return names


def to_json(records: Mapping[int, LayerRecord]) -> dict[str, Any]:
    """For a file; floats come back bit for bit."""
    return {str(layer): asdict(record) for layer, record in records.items()}


def from_json(value: Mapping[str, Any]) -> dict[int, LayerRecord]:
    """What :func:`to_json` made."""
    return {int(layer): LayerRecord(**{**fields, "residual": tuple(fields["residual"])}) for layer, fields in value.items()}


def summary(records: Mapping[int, LayerRecord], num_rows: int) -> str:
    """One line for the log."""
    before, after = (sum(record.residual[i] for record in records.values()) / max(len(records), 1) for i in (0, 1))
    gains = torch.tensor([gain for record in records.values() for gain in record.gain])
    distances = torch.tensor([distance for record in records.values() for distance in record.distance or ()])
    reach = f"heads look {distances.median():.0f} tokens back ({distances.min():.0f} to {distances.max():.0f}), " if len(distances) else ""
    scales = f"are scaled by {gains.min():.2g} to {gains.max():.2g}; " if len(gains) else ""
    return f"calibrated on {num_rows} rows: {reach}{scales}mean relative residual {before:.3f} before, {after:.3f} after"


class _Fit:
    """The normal equations of one layer's head scales, summed over tokens."""

    def __init__(self) -> None:
        self.gram_HH: Tensor | Any = 0
        self.cross_H: Tensor | Any = 0
        self.power: Tensor | Any = 0

    def add(self, heads_NQ: Tensor, read_out: nn.Linear, target_ND: Tensor, num_heads: int) -> None:
        """Add some tokens' contributions; the output projection's bias is no head's."""
        if read_out.bias is not None:
            target_ND = target_ND - read_out.bias
        gram_HH, cross_H = head_products(heads_NQ, read_out.weight.to(heads_NQ.dtype), target_ND, num_heads)
        self.gram_HH, self.cross_H = self.gram_HH + gram_HH.cpu(), self.cross_H + cross_H.cpu()
        self.power = self.power + target_ND.square().sum(dtype=torch.float64).cpu()

    def residual(self, gain_H: Tensor) -> float:
        """Squared error over power with these scales."""
        error = self.power - 2 * self.cross_H @ gain_H + gain_H @ self.gram_HH @ gain_H
        return float(error / self.power.clamp_min(1e-12))


def _pass(
    mixers: Mapping[int, Mixer], views: Mapping[int, AttentionView], stream: Stream, batches: Sequence[Batch]
) -> tuple[dict[int, Reach], dict[int, _Fit]]:
    """One pass over the rows: the reach of the layers in ``views``, and the fits of the mixers as they are."""
    reaches: dict[int, Reach] = {}
    fits = {layer: _Fit() for layer in mixers}
    for batch in batches:

        def visit(layer: int, inputs_BTD: Tensor, outputs_BTD: Tensor, kwargs: dict[str, Any], batch: Batch = batch) -> None:
            if layer not in mixers:
                return
            mixer, mask_BT = mixers[layer], batch.token_mask_BT
            heads_BTQ = _heads(mixer, inputs_BTD, kwargs)
            # Sums of products of thousands of tokens: not in the precision that the base runs in.
            with torch.autocast(inputs_BTD.device.type, enabled=False):
                assert mixer.read_out is not None
                dtype = torch.promote_types(inputs_BTD.dtype, torch.float32)
                fits[layer].add(heads_BTQ[mask_BT].to(dtype), mixer.read_out, outputs_BTD[mask_BT].to(dtype), mixer.facts.num_heads)
                if layer in views and _rotates(views[layer], kwargs):
                    reach = _reach(views[layer], inputs_BTD, kwargs.get("position_embeddings"), batch.documents_BT)
                    reaches[layer] = reaches[layer].plus(reach) if layer in reaches else reach

        stream(batch, visit)
    return reaches, fits


def _heads(mixer: Mixer, inputs_BTD: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """What a mixer's heads read ``[B, T, H * V]``, before the output projection sums them."""
    assert mixer.read_out is not None
    held: list[Tensor] = []
    handle = mixer.read_out.register_forward_pre_hook(lambda module, args: held.append(args[0]))
    try:
        mixer(inputs_BTD, **kwargs)
    finally:
        handle.remove()
    return held[0]


def _rotates(view: AttentionView, kwargs: dict[str, Any]) -> bool:
    """Whether the attention's scores can be made again."""
    return not view.facts.rope or (view.facts.apply_rotary is not None and kwargs.get("position_embeddings") is not None)


def _reach(view: AttentionView, inputs_BTD: Tensor, rotary: Rotary | None, documents_BT: Tensor) -> Reach:
    facts = view.facts
    weights = ((view.q_weight_QD, view.q_bias), (view.k_weight_KD, view.k_bias))
    q, k = (F.linear(inputs_BTD.to(weight.dtype), weight, bias).unflatten(-1, (-1, facts.head_dim)) for weight, bias in weights)
    if facts.norm_type is not None:
        q, k = facts.normalise(view.q_norm, q), facts.normalise(view.k_norm, k)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    if rotary is not None:
        q, k = facts.rotate(q, k, rotary)
    return attention_reach(q, k, documents_BT, scaling=facts.scaling, softcap=facts.softcap, window=facts.sliding_window)
