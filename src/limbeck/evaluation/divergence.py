"""KL(teacher || student) in nats a token and top-1 agreement, several students against one pass of the teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limbeck.engine.parallel import World
from limbeck.errors import DataError
from limbeck.models.head import without_padding
from limbeck.ops.fused import linear_kl
from limbeck.types import Head


class DivergenceTally:
    """Sums over batches; divided once, at the end."""

    def __init__(self) -> None:
        self.kl = 0.0
        self.agreement = 0.0
        self.tokens = 0

    def add(self, hidden_BTD: Tensor, head: Head, teacher_BTD: Tensor, teacher_head: Head, mask_BT: Tensor) -> None:
        """Compare two models' predictions at the positions of a mask.

        Rows that only the wider of two heads has are padding: both are known to hold every id of the tokenizer.
        """
        num_ids = min(head.weight_VD.shape[0], teacher_head.weight_VD.shape[0])
        head, teacher_head = without_padding(head, num_ids), without_padding(teacher_head, num_ids)
        kl, metrics = linear_kl(hidden_BTD.flatten(0, 1), head, teacher_BTD.flatten(0, 1), teacher_head, mask_BT.flatten())
        self.kl += float(kl)
        self.agreement += float(metrics.agreement)
        self.tokens += int(metrics.count)

    def over(self, world: World) -> DivergenceTally:
        """The sums of all ranks, here."""
        self.kl, self.agreement, tokens = world.sum(torch.tensor([self.kl, self.agreement, self.tokens], dtype=torch.float64)).tolist()
        self.tokens = int(tokens)
        return self

    def result(self) -> dict[str, Any]:
        """``kl`` in nats a token, ``agreement`` as a share, ``tokens``."""
        if not self.tokens:
            raise DataError("no position of these rows has a label to predict: are the documents one token long?")
        return {"kl": self.kl / self.tokens, "agreement": self.agreement / self.tokens, "tokens": self.tokens}
