"""Cross-entropy by position in the document, and decode rates with their spread."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from limbeck.data.dataset import TokenRows
from limbeck.evaluation.decode import evaluating
from limbeck.evaluation.evaluate import text_batches
from limbeck.evaluation.perplexity import CrossEntropyTally
from limbeck.evaluation.speed import cache_bytes, decode_rates
from limbeck.models.head import head_of
from limbeck.models.packed import forward_packed
from limbeck.types import IGNORE


@torch.no_grad()
def by_position(models: Mapping[str, PreTrainedModel], rows: TokenRows, count: int, edges: Sequence[int]) -> dict[str, dict[str, float]]:
    """Model -> ``ce at A to B``: nats a token of held-out text whose position in its document (in the row) is in ``[A, B)``.

    All models meet the same tokens; what stands late in a file is another text than what stands early, so models are compared at one
    position, not positions with each other.
    """
    spans = list(itertools.pairwise(edges))
    tallies = {name: [CrossEntropyTally() for _ in spans] for name in models}
    with evaluating(models):
        for batch in text_batches(rows, count):
            for name, model in models.items():
                hidden_BTD, head = forward_packed(model, batch), head_of(model)
                for (low, high), tally in zip(spans, tallies[name], strict=True):
                    inside_BT = (batch.position_ids_BT >= low) & (batch.position_ids_BT < high)
                    tally.add(hidden_BTD, head, batch.labels_BT.where(inside_BT, IGNORE))
    return {
        name: {f"ce at {low} to {high}": t.result()["ce"] for (low, high), t in zip(spans, found, strict=True) if t.tokens}
        for name, found in tallies.items()
    }


def decoding(
    models: Mapping[str, PreTrainedModel], reference: str, contexts: Sequence[int], *, tokens: int, times: int
) -> list[dict[str, Any]]:
    """Rows of cache bytes, and of decode rates measured ``times`` over with their ratios to the reference's in the same measurement."""
    rows: list[dict[str, Any]] = []

    def add(name: str, metric: str, value: float) -> None:
        rows.append({"setting": f"speed: {name}", "metric": metric, "value": value})

    for context in contexts:
        reference_bytes = cache_bytes(models[reference], context)["bytes"]
        for name, model in models.items():
            held = cache_bytes(model, context)
            for part in ("bytes", "kv", "state"):
                add(name, f"{part} at {context}", held[part])
            add(name, f"bytes at {context}, over {reference}", held["bytes"] / reference_bytes)
    with evaluating(models):
        for time in range(times):
            found = decode_rates(models, contexts, tokens=tokens, seed=time)
            for name, entries in found.items():
                for entry, theirs in zip(entries, found[reference], strict=True):
                    rate, at = entry["tokens_per_second"], entry["context"]
                    add(name, f"decode tokens/s at {at}", rate)
                    add(name, f"decode tokens/s at {at}, over {reference}", rate / theirs["tokens_per_second"])
    return rows
