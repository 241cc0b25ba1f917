"""A frozen model in this process: final hidden states and the head, never logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from limbeck.config.parts.teachers import LocalTeacherOptions
from limbeck.models.head import head_of
from limbeck.models.observe import forward_observed
from limbeck.needs import AttentionQKV, HeadHidden, Need, TopK
from limbeck.ops.topk import linear_topk
from limbeck.teachers.documents import Ask, TopKRows, asks_of
from limbeck.teachers.scoring import Scorer, uniforms
from limbeck.types import Batch, Head, Output, Signal, TopKSignal, Visit


class LocalTeacher(Scorer):
    """Answers :class:`HeadHidden`; the fused divergences take it from there."""

    def __init__(self, options: LocalTeacherOptions, source: str):
        super().__init__(source, dtype=options.dtype, attention=options.attention, revision=options.revision)
        self.num_ids: int | None = None

    @torch.no_grad()
    def signal(self, batch: Batch, needs: Mapping[type[Need], Need]) -> Signal:
        """``signal[HeadHidden]`` is ``Output(hidden_BTD, head)``, ``signal[TopK]`` a :class:`~limbeck.types.TopKSignal`,
        ``signal[AttentionQKV]`` ``{layer: AttentionStates}``."""
        hidden_BTD, observed = forward_observed(self.model, batch, {AttentionQKV: needs[AttentionQKV]} if AttentionQKV in needs else {})
        signal, output = Signal(observed), Output(hidden_BTD, self.head())
        if HeadHidden in needs:
            signal[HeadHidden] = output
        if isinstance(need := needs.get(TopK), TopK):
            signal[TopK] = _top_k(output, batch, need)
        return signal

    def ask(self, asks: Sequence[Ask], need: TopK, *, alone: bool = False) -> list[TopKRows | None]:
        """Answer documents as teachers elsewhere do; ``alone`` computes each on its own, so that its bits depend on nothing else."""
        return [self.score([ask], need)[0] for ask in asks] if alone else list(self.score(asks, need))

    def head(self) -> Head:
        """The output projection, with padding that the student does not have masked."""
        return head_of(self.model, self.num_ids)

    def stream(self, batch: Batch, visit: Visit) -> None:
        """A local teacher does not stream; its options say so before anything is loaded."""
        raise TypeError("teacher 'local' does not stream attention: use teacher 'self'")


def _top_k(output: Output, batch: Batch, need: TopK) -> TopKSignal:
    rows_n = batch.signal_mask_BT.flatten().nonzero().squeeze(1)
    uniforms_nS = None
    if need.samples:
        asks, _ = asks_of(batch)
        drawn = [uniforms(ask, need.samples, seed=0) for ask in asks]
        uniforms_nS = torch.cat(drawn).to(rows_n.device) if drawn else torch.zeros(0, need.samples, device=rows_n.device)
    found = linear_topk(
        output.hidden_BTD.flatten(0, 1), output.head, rows_n, k=need.k, temperatures=need.temperatures, uniforms_nS=uniforms_nS
    )
    return TopKSignal(rows_n, found.ids_nK, found.logits_nK, found.log_z_nZ, need.temperatures, found.samples_nS)
