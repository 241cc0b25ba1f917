"""Documents in, top-k rows out: what a served teacher computes and what a capture stores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from limbeck.models.head import head_of
from limbeck.models.packed import forward_packed
from limbeck.needs import TopK
from limbeck.ops.topk import linear_topk
from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.frozen import FrozenModel
from limbeck.types import IGNORE, Batch, Head

ROW_TOKENS = 1024
"""Documents are packed into rows of this length; a longer one has a row of its own."""


class Scorer(FrozenModel):
    """A frozen model that scores documents.

    The same documents in the same order give the same bits, whatever was scored before: how documents are packed depends on
    them alone.
    """

    def head(self) -> Head:
        """The output projection that is scored with."""
        return head_of(self.model)

    @torch.no_grad()
    def score(self, asks: Sequence[Ask], need: TopK, *, seed: int = 0) -> list[TopKRows]:
        """One answer an ask, in order.  Samples come from ``seed`` and the document's own tokens."""
        if not asks:
            return []
        batch, starts = pack([ask.ids for ask in asks])
        device = self.model.device
        rows_n = torch.from_numpy(np.concatenate([start + ask.positions for start, ask in zip(starts, asks, strict=True)]))
        uniforms_nS = torch.cat([uniforms(ask, need.samples, seed) for ask in asks]).to(device) if need.samples else None
        hidden_BTD = forward_packed(self.model, batch.to(device))
        found = linear_topk(
            hidden_BTD.flatten(0, 1),
            self.head(),
            rows_n.to(device),
            k=need.k,
            temperatures=need.temperatures,
            uniforms_nS=uniforms_nS,
        )
        ids_nK, logits_nK, log_z_nZ = (
            found.ids_nK.int().cpu().numpy(), found.logits_nK.float().cpu().numpy(), found.log_z_nZ.float().cpu().numpy()
        )  # fmt: skip
        samples_nS = None if found.samples_nS is None else found.samples_nS.int().cpu().numpy()
        ends = np.cumsum([len(ask.positions) for ask in asks])
        return [
            TopKRows(ids_nK[a:b], logits_nK[a:b], log_z_nZ[a:b], None if samples_nS is None else samples_nS[a:b])
            for a, b in zip([0, *ends[:-1]], ends, strict=True)
        ]


def uniforms(ask: Ask, samples: int, seed: int) -> Tensor:
    """Uniform numbers ``[m, S]`` that belong to a document, fp64."""
    rng = np.random.default_rng([seed, *np.frombuffer(ask.key, "<u4").tolist()])
    # One row a position of the document, so that what is drawn at a position does not depend on which others are asked.
    return torch.from_numpy(rng.random((len(ask.ids), samples))[ask.positions])


def pack(documents: Sequence[np.ndarray], row_tokens: int = ROW_TOKENS) -> tuple[Batch, list[int]]:
    """Documents in as few rows as first fit finds, and the index of each one's first token in the flattened ``[B * T]``."""
    lengths = [len(ids) for ids in documents]
    width = max(*lengths, min(row_tokens, sum(lengths)), 1)
    fills: list[int] = []
    places: list[tuple[int, int]] = []
    for ids in documents:
        row = next((row for row, fill in enumerate(fills) if fill + len(ids) <= width), len(fills))
        if row == len(fills):
            fills.append(0)
        places.append((row, fills[row]))
        fills[row] += len(ids)
    shape = (len(fills), width)
    ids_BT, documents_BT = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    positions_BT = np.zeros(shape, np.int64)
    numbers = [0] * len(fills)
    for ids, (row, start) in zip(documents, places, strict=True):
        here = slice(start, start + len(ids))
        ids_BT[row, here], documents_BT[row, here], positions_BT[row, here] = ids, numbers[row], np.arange(len(ids))
        numbers[row] += 1
    for row, fill in enumerate(fills):
        positions_BT[row, fill:] = np.arange(width - fill)
    parts = (ids_BT, np.full(shape, IGNORE, np.int64), positions_BT, documents_BT)
    return Batch(*map(torch.from_numpy, parts)), [row * width + start for row, start in places]
