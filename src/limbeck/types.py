"""The contracts between the rooms.

Shape legend, used as suffixes everywhere: **B** batch, **T** tokens, **V** vocabulary, **K** kept teacher tokens, **D** model
width, **H** heads, **L** layers, **E** experts, **N** adapters in a batch, **R** LoRA rank, **O** and **I** outputs and inputs of
a Linear, **n** positions picked out of a batch.  What a file calls otherwise is explained there.

Hidden states and a :class:`Head` travel, never logits: the fused operators in ``ops/`` take it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
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
    positions restart at 0 as if it were a document of its own).  ``answered_BT`` is False where a teacher that may fail gave no
    answer (None: it answered everything); ``domains_BT`` numbers the domain of each token's document (None: there is one).

    For adapters: ``adapters_B`` numbers the condition (and so the teacher adapter) of each row, -1 for a row of padding;
    ``condition_BSC`` holds the S texts of at most C tokens by which a generator is told what adapter is wanted, padded with -1.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    position_ids_BT: Tensor
    documents_BT: Tensor
    answered_BT: Tensor | None = None
    domains_BT: Tensor | None = None
    adapters_B: Tensor | None = None
    condition_BSC: Tensor | None = None

    @property
    def label_mask_BT(self) -> Tensor:
        """Positions whose prediction counts, bool ``[B, T]``."""
        return self.labels_BT != IGNORE

    @property
    def signal_mask_BT(self) -> Tensor:
        """Positions whose prediction counts and for which the teacher's answer is there, bool ``[B, T]``."""
        return self.label_mask_BT if self.answered_BT is None else self.label_mask_BT & self.answered_BT

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
        return Batch(**{name: part.to(device, non_blocking=True) for name, part in self._parts().items()})

    def split(self, rows: int) -> list[Batch]:
        """Micro-batches of at most ``rows`` rows each."""
        parts = {name: part.split(rows) for name, part in self._parts().items()}
        return [Batch(**dict(zip(parts, chunk, strict=True))) for chunk in zip(*parts.values(), strict=True)]

    def _parts(self) -> dict[str, Tensor]:
        return {f.name: part for f in fields(self) if (part := getattr(self, f.name)) is not None}


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
    """What a student's forward gives: final hidden states (after the final norm) and the head that belongs to them.

    ``observed`` answers what objectives need to see inside the network, by the class of the need: ``observed[RouterLogits]`` is
    ``{layer: Routing}``, ``observed[AttentionQKV]`` ``{layer: AttentionStates}``.
    """

    hidden_BTD: Tensor
    head: Head
    observed: Mapping[type[Need], Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Routing:
    """A router's answer for a batch: logits over its E experts, and the K experts (int64) that each token goes to."""

    logits_BTE: Tensor
    chosen_BTK: Tensor


@dataclass(frozen=True)
class AttentionStates:
    """Queries, keys and values of a layer as its projections give them, all heads side by side: Q and K wide (before norms and
    rotation).

    ``onward`` are the same numbers as the network goes on with, of any shape: what comes back to them is the gradient of all
    else but of what looks at the states here.
    """

    q_BTQ: Tensor
    k_BTK: Tensor
    v_BTK: Tensor
    onward: tuple[Tensor, ...] = ()


class Signal(dict[type[Need], Any]):
    """A teacher's answers, by the class of the need: ``signal[HeadHidden]`` is an :class:`Output`."""

    def to(self, device: torch.device | str) -> Signal:
        """The same answers on another device; those of a network in this process are where it is."""
        return Signal({need: value.to(device) if hasattr(value, "to") else value for need, value in self.items()})


@dataclass(frozen=True)
class TopKSignal:
    """``signal[TopK]``: a truncated distribution for each of ``n`` positions of a micro-batch.

    ``rows_n`` (int64, ascending) are the positions, as indices into the flattened ``[B * T]``: those of
    ``batch.signal_mask_BT``, no more.  Row ``i`` predicts the token ``labels_BT.flatten()[rows_n[i]]``.
    ``ids_nK`` (int64) are the K kept ids, likeliest first, ``logits_nK`` (fp32) their logits before any temperature,
    ``log_z_nZ`` (fp32) ``logsumexp(logits / T)`` over the whole vocabulary for each of Z ``temperatures``: the probability of
    ``ids_nK`` at ``T`` is ``exp(logits / T - log_z)``.  A source of log-probabilities gives those as logits with ``log_z = 0`` at
    T = 1.  ``samples_nS`` are S ids drawn with repetition from the tail at ``temperatures[0]`` (the whole distribution if K = 0).
    """

    rows_n: Tensor
    ids_nK: Tensor
    logits_nK: Tensor
    log_z_nZ: Tensor
    temperatures: tuple[float, ...]
    samples_nS: Tensor | None = None

    def to(self, device: torch.device | str) -> TopKSignal:
        """The same signal on another device."""
        moved = {f.name: part.to(device, non_blocking=True) for f in fields(self) if isinstance(part := getattr(self, f.name), Tensor)}
        return replace(self, **moved)


Metric = tuple[Tensor | float, Tensor | float]
"""A metric as ``(sum, count)``: summed over micro-batches and ranks, divided once for the log."""


@dataclass(frozen=True)
class LossTerm:
    """One objective's contribution: ``sum``, a scalar, over counted positions, and ``metrics`` that are ``(sum, count)`` pairs of
    scalars too."""

    sum: Tensor
    metrics: dict[str, Metric] = field(default_factory=dict)


class Objective(Protocol):
    """A loss.  ``count`` comes from the masks alone: it is summed over micro-batches and ranks before any forward.

    One that knows how a training goes wrong also has ``warning(validations) -> str | None``: a sentence about the held-out measures
    so far, oldest first.  One that looks inside the student says what it wants in ``student_needs`` and finds it in ``output.observed``.
    One whose terms are measured against statistics of whole steps has ``statistics() -> Tensor | None`` (this rank's sums of a step,
    which that call forgets) and ``settle(total)``, called with their sum over the ranks between a step's last micro-batch and the next
    step: so neither micro-batches nor ranks change a loss.
    """

    name: str
    weight: float

    def count(self, batch: Batch) -> Tensor:
        """Number of positions this loss sums over, an int64 scalar."""
        ...

    def __call__(self, output: Output, signal: Signal, batch: Batch) -> LossTerm:
        """The summed loss and its metrics."""
        ...


class Pending(Protocol):
    """An answer that is on its way."""

    def result(self, timeout: float | None = None) -> tuple[Batch, Signal]:
        """Wait for it, at most ``timeout`` seconds (then :class:`TimeoutError`, and the answer is still on its way).

        The batch is the one that was asked about, with what the teacher's fault policy left out masked.
        """
        ...


Visit = Callable[[int, Tensor, Tensor, dict[str, Any]], None]
"""``visit(layer, inputs_BTD, outputs_BTD, kwargs)``: called inside the teacher's hooks, one attention layer at a time."""


class Teacher(Protocol):
    """Where a signal comes from.  Construction is light; weights arrive with :meth:`load`.

    A teacher whose answers take time and no compute of this process also has ``submit(batch, needs) -> Pending`` and
    ``lookahead``, the number of steps whose requests go out before they are needed; ``close()`` ends its work, and ``advice()``
    is one line for a run that waits for it.
    """

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
