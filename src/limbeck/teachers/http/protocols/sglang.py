"""SGLang: `input_top_logprobs` of the generate route, log-probabilities at T = 1.

With ``logprob_start_len: P`` entry ``e`` belongs to token ``P + e``: it is the distribution **of** that token given those before it,
and entry 0 is null whatever P is.  With P the first position asked about, the row after position ``p`` is entry ``p + 1 - P``.
Three forms are read: nested ``[[value, id, null], ...]``; flat lists; flat base64.  In the flat forms the first
``input_top_logprobs_null_prefix`` entries are left out of the data, and ``input_top_logprobs_shape`` counts them in some releases and
leaves them out in others: the length of the data tells which.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from limbeck.needs import TopK
from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.http.faults import BadReply
from limbeck.teachers.http.protocols.base import Protocol, field_of, json_of, listed, log_probabilities
from limbeck.teachers.http.transport import Reply

_SAME = 0.02
"""A token's own log-probability and the one in its top-k row are the same number, rounded on two ways."""


class SGLangProtocol(Protocol):
    """``POST /generate`` with token ids."""

    name = "sglang"
    health_path = "/health"

    @staticmethod
    def endpoint(url: str) -> str:
        return url.rstrip("/").removesuffix("/generate").removesuffix("/v1")

    def request(self, asks: Sequence[Ask], need: TopK) -> tuple[str, dict[str, Any]]:
        return "/generate", {
            "input_ids": [ask.ids.tolist() for ask in asks],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": [_start(ask) for ask in asks],
            "top_logprobs_num": need.k,
            "return_text_in_logprobs": False,
            # Servers that do not know these answer in the nested form.
            "return_flat_raw_top_logprobs": True,
            "return_flat_raw_top_logprobs_b64": True,
        }

    def heated(self, body: dict[str, Any], temperature: float) -> dict[str, Any]:
        return {**body, "sampling_params": {**body["sampling_params"], "temperature": temperature}}

    def parse(self, reply: Reply, asks: Sequence[Ask], need: TopK) -> list[TopKRows]:
        results = json_of(reply)
        results = listed([results] if isinstance(results, dict) else results, "results", len(asks))
        return [self._rows(field_of(result, "meta_info"), ask, need.k) for result, ask in zip(results, asks, strict=True)]

    def _rows(self, meta: Any, ask: Ask, k: int) -> TopKRows:
        start = _start(ask)
        length = len(ask.ids) - start
        own = listed(field_of(meta, "input_token_logprobs"), "input_token_logprobs", length)
        for e, (_, token, *_) in enumerate(own):
            # Its last id of all is reported as 0.
            if token != ask.ids[start + e] and token != 0:
                raise BadReply(f"input_token_logprobs[{e}] is of token {token}, and the prompt has {ask.ids[start + e]} there")
        first, ids_eK, values_eK = _nested(meta, length, k) if "input_top_logprobs" in meta else _flat(meta, length, k)
        rows_m = ask.positions.astype(np.int64) + 1 - start - first
        if len(rows_m) and rows_m[0] < 0:
            raise BadReply(f"the first {first} entries of input_top_logprobs are null, and {rows_m[0] + first} was asked for")
        ids_mK, values_mK = ids_eK[rows_m], values_eK[rows_m]
        _agree(ids_mK, values_mK, [own[e] for e in rows_m + first])
        return log_probabilities(ids_mK, values_mK)


def _start(ask: Ask) -> int:
    return int(ask.positions[0]) if len(ask.positions) else len(ask.ids) - 1


def _nested(meta: Any, length: int, k: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Number of nulls in front, and ids and values of the entries after them."""
    entries = listed(meta["input_top_logprobs"], "input_top_logprobs", length)
    first = next((e for e, entry in enumerate(entries) if entry), length)
    if first < 1:
        raise BadReply("input_top_logprobs that do not begin with null: not aligned to the tokens as SGLang's are")
    kept = entries[first:]
    if any(entry is None or len(entry) != k for entry in kept):
        raise BadReply(f"input_top_logprobs with rows that do not have the {k} entries asked for")
    # One array of both: ids are exact in double precision.
    both = np.array([[pair[:2] for pair in entry] for entry in kept], np.float64).reshape(len(kept), k, 2)
    return first, both[..., 1].astype(np.int64), both[..., 0]


def _flat(meta: Any, length: int, k: int) -> tuple[int, np.ndarray, np.ndarray]:
    """The same from the flat forms."""
    first = int(field_of(meta, "input_top_logprobs_null_prefix"))
    rows, width = field_of(meta, "input_top_logprobs_shape")
    values, ids = (_column(meta, f"input_top_logprobs_{name}_flat") for name in ("val", "idx"))
    if width != k or len(values) != len(ids) or len(values) != (length - first) * k or rows not in (length, length - first):
        raise BadReply(
            f"input_top_logprobs of shape {[rows, width]} with {len(values)} values and {len(ids)} ids, {first} nulls before them, "
            f"where {length} entries of {k} were asked for"
        )
    if first < 1:
        raise BadReply("input_top_logprobs that do not begin with null: not aligned to the tokens as SGLang's are")
    return first, ids.astype(np.int64).reshape(-1, k), values.astype(np.float64).reshape(-1, k)


def _column(meta: Any, name: str) -> np.ndarray:
    if f"{name}_b64" not in meta:
        return np.array(field_of(meta, name), np.float64)
    dtype = np.dtype(field_of(meta, f"{name}_b64_dtype")).newbyteorder("<")
    return np.frombuffer(base64.b64decode(meta[f"{name}_b64"], validate=True), dtype)


def _agree(ids_mK: np.ndarray, values_mK: np.ndarray, own: Sequence[Any]) -> None:
    """Where the prompt's own token is in its row, both must give it one probability: a shifted row does not."""
    tokens_m, logprobs_m = (np.array([entry[i] for entry in own], np.float64) for i in (1, 0))
    rows, columns = np.nonzero(ids_mK == tokens_m[:, None])
    apart = np.abs(values_mK[rows, columns] - logprobs_m[rows])
    # Far down in the tail a rounded difference is large and means nothing.
    known = (tokens_m[rows] > 0) & (logprobs_m[rows] > -30)
    if (apart[known] > _SAME).any():
        raise BadReply("input_top_logprobs and input_token_logprobs disagree: the rows are not aligned to the tokens")
