"""What the objectives on routers have in common: one counted token for each that is not padding, the mean over layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from limbeck.config.parts.objectives import RouterOptions
from limbeck.errors import RunError
from limbeck.needs import RouterLogits
from limbeck.types import Batch, LossTerm, Output, Routing, Signal


class RouterObjective:
    """Summed over the real tokens, averaged over the layers that have a router."""

    name: str

    def __init__(self, options: RouterOptions):
        self.weight, self.schedule = options.weight_at(0), options.schedule
        self.student_needs = options.observes()

    def count(self, batch: Batch) -> Tensor:
        """Real tokens: each is routed, whether its prediction counts or not."""
        return batch.token_mask_BT.sum()

    def __call__(self, output: Output, signal: Signal, batch: Batch) -> LossTerm:
        """The sum of :meth:`term` over real tokens."""
        return LossTerm(summed(self.routing(output), batch, self.term))

    def term(self, logits_LBTE: Tensor) -> Tensor:
        """The loss of each layer and token, ``[L, B, T]``."""
        raise TypeError(f"{type(self).__name__} defines no term")

    def routing(self, output: Output) -> dict[int, Routing]:
        """What the routers said, by layer; a dense student is refused."""
        found = output.observed.get(RouterLogits)
        if not found:
            raise RunError(
                f"objective '{self.name}' is about the routers of a mixture of experts, and this student has none (it is dense): take the objective out, or "
                "start from a mixture of experts"
            )
        return dict(found)


def summed(routing: Mapping[int, Routing], batch: Batch, term: Callable[[Tensor], Tensor]) -> Tensor:
    """``term(logits_LBTE) -> [L, B, T]``, the mean over layers, summed over real tokens."""
    # All layers at once, in fp32 at least whatever the step computes in.
    logits = torch.stack([r.logits_BTE for r in routing.values()])
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    with torch.autocast(wide.device.type, enabled=False):
        term_BT = term(wide).mean(0)
    return torch.where(batch.token_mask_BT, term_BT, 0).sum()
