"""Endpoints that return whole logits: ``{"input_ids": [[..]], "return_logits": true}``.

``logits[b][t]`` are those after token ``t``: the row of a position is the position.  The k likeliest ids and the partition sums are
taken here, exactly.  A vocabulary as JSON is megabytes a token: this is for servers that have nothing better.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from limbeck.needs import TopK
from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.http.faults import BadReply
from limbeck.teachers.http.protocols.base import Protocol, field_of, json_of, listed
from limbeck.teachers.http.transport import Reply


class SeedProtocol(Protocol):
    """``POST`` to the URL as it stands."""

    name = "seed"
    health_path = ""
    any_temperature = True

    @staticmethod
    def endpoint(url: str) -> str:
        return url

    def request(self, asks: Sequence[Ask], need: TopK) -> tuple[str, dict[str, Any]]:
        return "", {"input_ids": [ask.ids.tolist() for ask in asks], "return_logits": True}

    def parse(self, reply: Reply, asks: Sequence[Ask], need: TopK) -> list[TopKRows]:
        documents = listed(field_of(json_of(reply), "logits"), "logits", len(asks))
        return [self._rows(document, ask, need) for document, ask in zip(documents, asks, strict=True)]

    def _rows(self, document: Any, ask: Ask, need: TopK) -> TopKRows:
        # Rows of padding behind a shorter document are no error.
        if not isinstance(document, list) or len(document) < len(ask.ids):
            raise BadReply(f"logits of fewer rows than the {len(ask.ids)} tokens that were sent")
        logits_mV = torch.from_numpy(np.array([document[p] for p in ask.positions.tolist()], np.float32))
        if not len(ask.positions):
            logits_mV = torch.empty(0, len(document[0]))
        if logits_mV.ndim != 2 or logits_mV.isnan().any():
            raise BadReply("logits that are no table of numbers")
        if logits_mV.shape[1] != (self.vocabulary or logits_mV.shape[1]):
            raise BadReply(f"logits of {logits_mV.shape[1]} ids where there were {self.vocabulary} before")
        self.vocabulary = logits_mV.shape[1]
        kept = logits_mV.topk(min(need.k, logits_mV.shape[1]), dim=1)
        log_z_mZ = torch.stack([(logits_mV / t).logsumexp(1) for t in need.temperatures], 1)
        return TopKRows(kept.indices.int().numpy(), kept.values.numpy(), log_z_mZ.numpy())
