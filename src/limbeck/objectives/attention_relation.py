"""Relations between tokens in one attention layer, student against teacher (BitDistill, arXiv 2510.13998; MiniLMv2, arXiv 2012.15828).

A fixed weight that fits one model is a hundred times too large for another: with ``ratio`` the weight follows the gradients instead.
They are compared where both pass anyway, at the layer's projections: the loss sees the states through a gate whose backward pass
measures its gradient, and a hook on the states that the network goes on with measures that of all else.  Squared norms of gradients at
tokens add up over micro-batches and ranks, so neither changes the weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from limbeck.config.parts.objectives import AttentionRelationOptions
from limbeck.errors import RunError
from limbeck.needs import AttentionQKV
from limbeck.ops.attention_relation import relation_divergence
from limbeck.types import AttentionStates, Batch, LossTerm, Metric, Output, Signal


class AttentionRelation:
    """Summed over real tokens; each has relations."""

    name = "attention_relation"

    def __init__(self, options: AttentionRelationOptions):
        self.weight, self.schedule = options.weight_at(0), options.schedule
        self.student_needs = options.observes()
        self.options = options
        self._measured = False
        self._ratio = math.nan
        self._squares: Tensor | None = None

    def count(self, batch: Batch) -> Tensor:
        """Real tokens."""
        return batch.token_mask_BT.sum()

    def __call__(self, output: Output, signal: Signal, batch: Batch) -> LossTerm:
        """Metrics, with ``ratio``: the ``weight`` of the step, and the ``ratio`` that was measured on the one before."""
        options = self.options
        student: AttentionStates = output.observed[AttentionQKV][options.layer]
        teacher: AttentionStates = signal[AttentionQKV][options.source_layer]
        ours = (student.q_BTQ, student.k_BTK, student.v_BTK)
        theirs = (teacher.q_BTQ, teacher.k_BTK, teacher.v_BTK)
        self._check_widths(ours, "student", options.layer)
        self._check_widths(theirs, "teacher", options.source_layer)
        balancing = options.ratio is not None and torch.is_grad_enabled()
        if balancing:
            ours = self._watched(ours, student.onward)
        with torch.autocast(ours[0].device.type, enabled=False):
            total = torch.stack([
                relation_divergence(
                    mine, other, batch.documents_BT, heads=options.heads, temperature=options.temperature, causal=options.causal, chunk=options.chunk
                )
                for mine, other in zip(ours, theirs, strict=True)
            ]).sum()  # fmt: skip
        metrics: dict[str, Metric] = {}
        if balancing:
            metrics[f"{self.name}/weight"] = (self.weight if self._measured else 0.0, 1)
            if math.isfinite(self._ratio):
                metrics[f"{self.name}/ratio"] = (self._ratio, 1)
        return LossTerm(total, metrics)

    def _check_widths(self, states: tuple[Tensor, ...], who: str, layer: int) -> None:
        heads = self.options.heads
        widths = {word: x.shape[-1] for word, x in zip(("queries", "keys", "values"), states, strict=True)}
        odd = [f"{word} of width {width}" for word, width in widths.items() if width % heads]
        if odd:
            fits = math.gcd(*widths.values())
            raise RunError(
                f"objective '{self.name}': {heads} relation heads do not divide the {' and '.join(odd)} of the {who}'s layer {layer}: set `heads` to "
                f"a divisor of {fits}"
            )

    # -- the weight that follows the gradients ---------------------------------------------------------------------------

    def _watched(self, states: tuple[Tensor, ...], onward: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The states as the loss sees them; gradients of the loss, and of all else, are measured as they pass."""
        if self._squares is None:
            self._squares = torch.zeros(2, dtype=torch.float64, device=states[0].device)
        squares = self._squares
        for state in onward:
            if state.requires_grad:
                state.register_hook(lambda grad: _add(squares[1], grad))
        return tuple(_Gate.apply(state, squares[0], self._measured) for state in states)

    def statistics(self) -> Tensor | None:
        """This rank's squared norms in the step that ends, fp64 ``[2]``: of this loss's gradient, and of all others' together."""
        squares, self._squares = self._squares, None
        return squares

    def settle(self, total: Tensor) -> None:
        """Take the squared norms of all ranks, ``total [2]`` as of :meth:`statistics`, for the next step's weight."""
        mine, others = total.sqrt().tolist()
        if not (0 < mine < math.inf and 0 < others < math.inf):
            return
        assert self.options.ratio is not None
        self._ratio = mine / others
        wanted = math.log(self.weight * self.options.ratio / self._ratio)
        memory = self.options.ratio_memory if self._measured else 0.0
        self.weight = math.exp(memory * math.log(self.weight) + (1 - memory) * wanted)
        self._measured = True

    def state(self) -> dict[str, Tensor]:
        """The weight that was reached: a run that goes on has the same loss."""
        return {"weight": torch.tensor([self.weight, self._ratio], dtype=torch.float64)} if self._measured else {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take the weight of a checkpoint: ``state`` is ``{weight: [2]}``, as :meth:`state` gave it."""
        self.weight, self._ratio = state["weight"].tolist()
        self._measured = True


class _Gate(torch.autograd.Function):
    """The identity; its backward pass measures the gradient that comes through and lets it on only if ``is_open``."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, squares: Tensor, is_open: bool) -> Tensor:
        """The state as it is."""
        ctx.squares, ctx.is_open = squares, is_open
        return state.view_as(state)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The gradient, or zeros while the weight is not known."""
        _add(ctx.squares, grad)
        return grad if ctx.is_open else torch.zeros_like(grad), None, None


def _add(squares: Tensor, grad: Tensor) -> None:
    squares.add_(grad.double().square().sum())
