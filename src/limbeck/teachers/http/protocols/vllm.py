"""vLLM: `prompt_logprobs` of the completions route, log-probabilities at T = 1.

Entry ``i`` of ``prompt_logprobs`` is the distribution **of** token ``i`` given the tokens before it, and entry 0 is null.  The row
after position ``p`` is entry ``p + 1``.  An entry maps ids (as text) to ``{"logprob", "rank", "decoded_token"}``; the prompt's own
token is always in it, first, so that there are k + 1 of them when it is not among the k likeliest.  It is told by its rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from limbeck.needs import TopK
from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.http.faults import BadReply
from limbeck.teachers.http.protocols.base import Protocol, field_of, json_of, listed, log_probabilities
from limbeck.teachers.http.transport import Reply


class VLLMProtocol(Protocol):
    """``POST /v1/completions`` with token ids as prompts."""

    name = "vllm"
    health_path = "/health"
    tokens_at_k = "--max-logprobs"

    @staticmethod
    def endpoint(url: str) -> str:
        return url.rstrip("/").removesuffix("/completions").removesuffix("/v1")

    def request(self, asks: Sequence[Ask], need: TopK) -> tuple[str, dict[str, Any]]:
        return "/v1/completions", {
            "model": self.model,
            "prompt": [ask.ids.tolist() for ask in asks],
            # By default sixteen tokens are generated, for nothing; fewer than one cannot be asked for.
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": need.k,
            "add_special_tokens": False,
        }

    def heated(self, body: dict[str, Any], temperature: float) -> dict[str, Any]:
        return {**body, "temperature": temperature}

    def parse(self, reply: Reply, asks: Sequence[Ask], need: TopK) -> list[TopKRows]:
        choices = listed(field_of(json_of(reply), "choices"), "choices", len(asks))
        by_index = {field_of(choice, "index"): choice for choice in choices}
        return [self._rows(field_of(by_index[i], "prompt_logprobs"), ask, need.k) for i, ask in enumerate(asks)]

    def _rows(self, entries: Any, ask: Ask, k: int) -> TopKRows:
        listed(entries, "prompt_logprobs", len(ask.ids))
        if entries[0] is not None:
            raise BadReply("prompt_logprobs that do not begin with null: not aligned to the tokens as vLLM's are")
        ids_mK = np.empty((len(ask.positions), k), np.int64)
        values_mK = np.empty((len(ask.positions), k), np.float64)
        for row, position in enumerate(ask.positions.tolist()):
            entry = entries[position + 1]
            # The token itself is in its own entry: a shifted or truncated list does not get past this.
            if not isinstance(entry, Mapping) or str(int(ask.ids[position + 1])) not in entry:
                raise BadReply(f"prompt_logprobs[{position + 1}] does not hold the prompt's token there: other tokens were scored")
            kept = sorted((value["rank"], -value["logprob"], int(token)) for token, value in entry.items() if value["rank"] <= k)[:k]
            if len(kept) != k:
                raise BadReply(f"prompt_logprobs[{position + 1}] holds {len(kept)} of the {k} likeliest tokens")
            ids_mK[row] = [token for _, _, token in kept]
            values_mK[row] = [-value for _, value, _ in kept]
        return log_probabilities(ids_mK, values_mK)
