"""KL against a teacher of which only the likeliest ids are known, or ids drawn from it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from limbeck.config.parts.objectives import TopKKLOptions
from limbeck.errors import TeacherError
from limbeck.needs import TopK
from limbeck.ops.topk_divergence import linear_topk_divergence
from limbeck.types import Batch, LossTerm, Metric, Output, Signal, TopKSignal


class TopKKL:
    """Summed over the positions that count and that the teacher answered, times the temperature squared."""

    name = "topk_kl"

    def __init__(self, options: TopKKLOptions):
        self.weight, self.schedule = options.weight_at(0), options.schedule
        self.options = options

    def count(self, batch: Batch) -> Tensor:
        """Positions whose prediction counts and which the teacher answered."""
        return batch.signal_mask_BT.sum()

    def __call__(self, output: Output, signal: Signal, batch: Batch) -> LossTerm:
        """Metrics, at the loss's temperature without its square, a token.

        ``kl``: forward KL over the kept ids and the rest, in nats (never above the full one; none without kept ids or with
        ``renorm_both``, which knows no rest); ``mass``: the teacher's probability of the kept ids; ``tail_gap``: |student's -
        teacher's| probability of the rest; ``agreement`` of the top ids.
        """
        options = self.options
        loss, found = linear_topk_divergence(
            output.hidden_BTD.flatten(0, 1),
            output.head,
            self._checked(signal[TopK], batch),
            k=options.k,
            tail=options.tail,
            direction=options.direction,
            temperature=options.temperature,
            allow_approximate_tail=options.allow_approximate_tail,
            chunk=options.chunk,
        )
        sums = {"mass": found.mass, "tail_gap": found.tail_gap, "agreement": found.agreement}
        if options.tail != "renorm_both":
            sums["kl"] = found.kl
        metrics: dict[str, Metric] = {name: (value, found.count) for name, value in sums.items() if value is not None}
        return LossTerm(loss, metrics)

    def _checked(self, signal: TopKSignal, batch: Batch) -> TopKSignal:
        """The signal with this objective's samples; rows that are not the batch's own would teach the wrong tokens."""
        mask_N = batch.signal_mask_BT.flatten()
        rows_n = signal.rows_n
        if len(rows_n) != int(mask_N.sum()) or not bool(mask_N[rows_n].all()):
            raise TeacherError(
                f"teacher's signal: {len(rows_n)} rows for the {int(mask_N.sum())} positions of the batch that count, or rows of other "
                "positions; the teacher must answer for exactly those of `batch.signal_mask_BT`"
            )
        samples = self.options.samples
        if not samples:
            return replace(signal, samples_nS=None)
        drawn = 0 if signal.samples_nS is None else signal.samples_nS.shape[1]
        if drawn < samples and len(rows_n):
            raise TeacherError(
                f"teacher's signal: {drawn} samples a token, and topk_kl wants {samples}; use a teacher that draws them (local, or "
                "`limbeck teach`), or `samples: 0`"
            )
        return replace(signal, samples_nS=None if signal.samples_nS is None else signal.samples_nS[:, :samples])
