"""Load balance of a mixture of experts (Switch Transformers), layer by layer, against the load of whole steps.

``E sum_e f_e P_e`` with ``f`` the share of (token, slot) choices that fell on expert e and ``P`` its mean probability.  Were ``f`` a
micro-batch's own, splitting a step into micro-batches or ranks would change the loss (a small micro-batch is asked to be balanced in
itself, which keeps experts from specialising: Qiu et al., arXiv 2501.11873).  A step's own load is known after its last forward, when
the first graphs are gone; so ``f`` is the load of the step before, counted over all its micro-batches and ranks, or, with ``load: step``,
that of a pass without gradients over the whole step.  It is a constant of the step, which makes the loss additive over tokens, and a
part of the checkpoint.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from limbeck.config.parts.objectives import MoEBalanceOptions
from limbeck.objectives.routing import RouterObjective, summed
from limbeck.types import Batch, LossTerm, Metric, Output, Signal


class MoEBalance(RouterObjective):
    """1 where the routers are uniform, E / K where all tokens go to the same K experts."""

    name = "moe_balance"

    def __init__(self, options: MoEBalanceOptions):
        super().__init__(options)
        self.memory = options.memory
        self.previews = options.load == "step"
        """Whether the step is shown to :meth:`preview` first."""
        self._load_LE: Tensor | None = None
        self._counts_LE: Tensor | None = None

    def __call__(self, output: Output, signal: Signal, batch: Batch) -> LossTerm:
        """Metrics, of the load that is known: ``router/idle`` experts that no token chose, over all layers; ``router/cv`` standard
        deviation of the load over its mean, mean over layers; ``router/peak/<layer>`` the busiest expert's load over the mean."""
        routing = self.routing(output)
        first = next(iter(routing.values()))
        counts_LE = self._count(torch.stack([r.chosen_BTK for r in routing.values()]), batch, first.logits_BTE.shape[-1])
        learning = torch.is_grad_enabled()
        if learning and not self.previews:
            self._add(counts_LE)
        load_LE = self._load_LE
        if load_LE is None:
            # Nothing to be measured against yet: a step is not pushed, a validation of what does not train has its own load.
            load_LE = torch.ones_like(counts_LE) if learning else counts_LE
        term = summed(routing, batch, partial(balance, load_LE=load_LE))
        return LossTerm(term, {} if self._load_LE is None else self._measures(list(routing)))

    def preview(self, output: Output, batch: Batch) -> None:
        """Count a micro-batch of the step that is about to be done."""
        routing = self.routing(output)
        num_experts = next(iter(routing.values())).logits_BTE.shape[-1]
        self._add(self._count(torch.stack([r.chosen_BTK for r in routing.values()]), batch, num_experts))

    def _add(self, counts_LE: Tensor) -> None:
        self._counts_LE = counts_LE if self._counts_LE is None else self._counts_LE + counts_LE

    @staticmethod
    def _count(chosen_LBTK: Tensor, batch: Batch, num_experts: int) -> Tensor:
        """Choices of each expert by real tokens, int64 ``[L, E]``."""
        num_layers = len(chosen_LBTK)
        offsets = torch.arange(num_layers, device=chosen_LBTK.device)[:, None, None, None] * num_experts
        # Padding counts for an expert that does not exist.
        places = torch.where(batch.token_mask_BT[..., None], chosen_LBTK + offsets, num_layers * num_experts).flatten()
        counts = torch.zeros(num_layers * num_experts + 1, dtype=torch.int64, device=places.device)
        return counts.scatter_add_(0, places, torch.ones_like(places))[:-1].view(num_layers, num_experts)

    def _measures(self, layers: list[int]) -> dict[str, Metric]:
        assert self._load_LE is not None
        load_LE = self._load_LE.double()
        mean_L = load_LE.mean(-1).clamp_min(torch.finfo(torch.float64).tiny)
        peak_L = load_LE.amax(-1) / mean_L
        cv = (load_LE.std(-1, correction=0) / mean_L).mean()
        # The same on every rank and in every micro-batch: counted once each, their mean is itself.
        return {
            "router/idle": ((load_LE == 0).sum(), 1),
            "router/cv": (cv, 1),
            **{f"router/peak/{layer}": (peak, 1) for layer, peak in zip(layers, peak_L.unbind(), strict=True)},
        }

    # -- what lasts from step to step ------------------------------------------------------------------------------------

    def statistics(self) -> Tensor | None:
        """This rank's choices in the step that ends, int64 ``[L, E]``."""
        counts, self._counts_LE = self._counts_LE, None
        return counts

    def settle(self, total: Tensor) -> None:
        """Take the choices of all ranks, ``total [L, E]``, for the next step's load."""
        load = total.double()
        if self._load_LE is not None:
            load = self.memory * self._load_LE.to(load) + (1 - self.memory) * load
        self._load_LE = load

    def state(self) -> dict[str, Tensor]:
        """The load: a run that goes on has the same loss."""
        return {} if self._load_LE is None else {"load": self._load_LE}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take the load of a checkpoint: ``state`` is ``{load: [L, E]}``, as :meth:`state` gave it."""
        self._load_LE = state["load"]


def balance(logits_LBTE: Tensor, load_LE: Tensor) -> Tensor:
    """``E sum_e f_e p_e`` of each layer and token, ``[L, B, T]``; ``f`` is the load's share of its sum in each layer."""
    load_LE = load_LE.to(logits_LBTE)
    found_LBT = (logits_LBTE.softmax(-1).flatten(1, 2) @ load_LE.unsqueeze(-1)).view(logits_LBTE.shape[:-1])
    # Divided by the mean load, not multiplied by its inverse: a uniform router gives 1 to the last bit.
    return found_LBT / load_LE.mean(-1)[:, None, None].clamp_min(torch.finfo(load_LE.dtype).tiny)
