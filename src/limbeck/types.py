"""The contracts between the rooms.

Shape legend, used as suffixes everywhere: **B** batch, **T** tokens, **V** vocabulary, **D** model width, **H** heads, **L** layers.
Hidden states and a :class:`Head` travel, never logits: the fused operators in ``ops/`` take it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from limbeck.needs import Need

IGNORE = -100
"""Label of a position whose prediction does not count."""


@dataclass(frozen=True)
class Batch:
    """Packed rows of documents.

    ``labels_BT[b, t]`` is the token that position ``t`` must predict (already shifted), or :data:`IGNORE` at the last token of
    a document piece, on padding and on masked text.  ``position_ids_BT`` restart at 0 in every document;
    ``documents_BT`` numbers the documents of a row from 0, and is -1 on padding (padding is always at a row's end, and its
    positions restart at 0 as if it were a document of its own).
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    position_ids_BT: Tensor
    documents_BT: Tensor

    @property
    def label_mask_BT(self) -> Tensor:
        """Positions whose prediction counts, bool ``[B, T]``."""
        return self.labels_BT != IGNORE

    @property
    def token_mask_BT(self) -> Tensor:
        """Positions that hold a real token, bool ``[B, T]``."""
        return self.documents_BT >= 0

    @property
    def num_tokens(self) -> int:
        """Real tokens in the batch: what a token budget counts."""
        return int(self.token_mask_BT.sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def split(self, rows: int) -> list[Batch]:
        """Micro-batches of at most ``rows`` rows each."""
        parts = {f.name: getattr(self, f.name).split(rows) for f in fields(self)}
        return [Batch(**dict(zip(parts, chunk, strict=True))) for chunk in zip(*parts.values(), strict=True)]


@dataclass(frozen=True)
class Head:
    """An output projection: ``logits = softcap(scale * (h @ weight.T + bias))`` with masked ids at -inf.

    ``weight_VD`` may be a DTensor; ``softcap`` is Gemma's ``c * tanh(x / c)``; ``scale`` multiplies the logits (Cohere's
    ``logit_scale``, the inverse of Granite's ``logits_scaling``); ``vocab_mask_V`` is True for ids that exist (padded
    vocabularies have a tail that does not).
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    vocab_mask_V: Tensor | None = None


@dataclass(frozen=True)
class Output:
    """What a student's forward gives: final hidden states (after the final norm) and the head that belongs to them."""

    hidden_BTD: Tensor
    head: Head
    hidden_layers: Mapping[int, Tensor] = field(default_factory=dict)


class Signal(dict[type[Need], Any]):
    """A teacher's answers, by the class of the need: ``signal[HeadHidden]`` is an :class:`Output`."""


Metric = tuple[Tensor | float, Tensor | float]
"""A metric as ``(sum, count)``: summed over micro-batches and ranks, divided once for the log."""


@dataclass(frozen=True)
class LossTerm:
    """One objective's contribution: the **sum** over counted positions, and metrics that are ``(sum, count)`` pairs too."""

    sum: Tensor
    metrics: dict[str, Metric] = field(default_factory=dict)


class Objective(Protocol):
    """A loss.  ``count`` comes from the masks alone: it is summed over micro-batches and ranks before any forward."""

    name: str
    weight: float

    def count(self, batch: Batch) -> Tensor:
        """Number of positions this loss sums over, an int64 scalar."""
        ...

    def __call__(self, output: Output, signal: Signal, batch: Batch) -> LossTerm:
        """The summed loss and its metrics."""
        ...


Visit = Callable[[int, Tensor, Tensor, dict[str, Any]], None]
"""``visit(layer, inputs_BTD, outputs_BTD, kwargs)``: called inside the teacher's hooks, one attention layer at a time."""


class Teacher(Protocol):
    """Where a signal comes from.  Construction is light; weights arrive with :meth:`load`."""

    module: nn.Module | None
    """The frozen network in this process, if there is one (the engine shards it)."""

    def load(self, device: torch.device) -> None:
        """Load weights or open the connection."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What the signal depends on: weights, tokenizer, vocabulary, attention implementation, dtype, code version."""
        ...

    def signal(self, batch: Batch, needs: Mapping[type[Need], Need]) -> Signal:
        """Answer every need for one micro-batch, without gradients."""
        ...

    def stream(self, batch: Batch, visit: Visit) -> None:
        """Run the teacher and call ``visit`` inside each attention layer's hook (needs :class:`AttentionStream`)."""
        ...
