"""Cross-entropy of held-out text: nats a token, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck.engine.parallel import World
from limbeck.errors import DataError
from limbeck.models.head import head_of
from limbeck.models.packed import forward_packed
from limbeck.ops.fused import linear_cross_entropy
from limbeck.types import IGNORE, Batch, Head


class CrossEntropyTally:
    """Sums over batches; divided once, at the end."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.correct = 0.0
        self.tokens = 0

    def add(self, hidden_BTD: Tensor, head: Head, labels_BT: Tensor) -> None:
        """Count the labelled positions of one batch; ``labels_BT`` are already shifted."""
        loss, metrics = linear_cross_entropy(hidden_BTD.flatten(0, 1), head, labels_BT.flatten())
        self.loss += float(loss)
        self.correct += float(metrics.agreement)
        self.tokens += int(metrics.count)

    def over(self, world: World) -> CrossEntropyTally:
        """The sums of all ranks, here."""
        self.loss, self.correct, tokens = world.sum(torch.tensor([self.loss, self.correct, self.tokens], dtype=torch.float64)).tolist()
        self.tokens = int(tokens)
        return self

    def result(self, num_bytes: int | None = None) -> dict[str, Any]:
        """``ce`` in nats a token, ``perplexity``, ``accuracy`` and counts; ``bits_per_byte`` where the bytes are known."""
        if not self.tokens:
            raise DataError("no position of these rows has a label to predict: are the documents one token long?")
        ce = self.loss / self.tokens
        # Beyond 700 nats exp overflows, and the number would say nothing that `ce` does not.
        result = {
            "ce": ce,
            "perplexity": math.exp(ce) if ce < 700 else None,
            "accuracy": self.correct / self.tokens,
            "tokens": self.tokens,
        }
        if num_bytes:
            result |= {"bits_per_byte": self.loss / math.log(2) / num_bytes, "bytes": num_bytes}
        return result


def whole_documents(batch: Batch) -> Tensor:
    """Positions of the documents that are labelled throughout, bool ``[B, T]``.

    Text is; made-up recall documents, of which only the answers count, are not: they have a measure of their own, and would make
    the perplexity of text look better than it is.
    """
    documents_BT = batch.documents_BT.clamp_min(0)
    masked_BT = (batch.labels_BT == IGNORE) & batch.token_mask_BT
    counts = torch.zeros(len(documents_BT), int(documents_BT.max()) + 1, dtype=torch.int64, device=documents_BT.device)
    counts.scatter_add_(1, documents_BT, masked_BT.long())
    # The last token of a document has no next one, and so no label.
    return (counts.gather(1, documents_BT) <= 1) & batch.token_mask_BT


def label_bytes(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes of the text that the labels of a batch spell.

    Special tokens spell nothing: their loss is paid for by the text around them.  A character cut by a row's edge counts as
    the three bytes of U+FFFD, so the count is good to a few bytes a row.
    """
    total = 0
    for labels_T, documents_T in zip(batch.labels_BT, batch.documents_BT, strict=True):
        for document in documents_T.unique():
            ids = labels_T[(documents_T == document) & (labels_T != IGNORE)].tolist()
            text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            total += len(text.encode("utf-8", errors="replace"))
    return total


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, batches: Iterable[Batch], tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """Cross-entropy of packed rows under one model; with a tokenizer, bits per byte too."""
    tally, num_bytes = CrossEntropyTally(), 0
    for batch in batches:
        num_bytes += label_bytes(batch, tokenizer) if tokenizer else 0
        batch = batch.to(model.device)
        tally.add(forward_packed(model, batch), head_of(model), batch.labels_BT)
    return tally.result(num_bytes)
