"""Behavioural matching: the generated adapter moves the base's hidden states on probes as its teacher does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from limbeck.adapters.deltas import DeltaSignal, embed, relative_error
from limbeck.adapters.output import AdaptedOutput, PredictedOutput
from limbeck.config.parts.objectives import DeltaObjectiveOptions, ProbedOptions
from limbeck.needs import Deltas
from limbeck.objectives.adapted import AdapterObjective, rows_that_count
from limbeck.types import Batch, LossTerm, Output, Signal

WORSE = 0.02
"""Nats a token by which held-out text must have got worse to be spoken of."""
SMALL = 1e-2
"""Share of the teacher's size below which a delta's own size no longer divides its cosine."""


class ProbedObjective(AdapterObjective):
    """Runs the base on probes with generated adapters, in a compute dtype of its own."""

    def __init__(self, options: ProbedOptions):
        super().__init__(options)
        self.microbatch, self.low = options.microbatch, options.precision == "bfloat16"

    @property
    def together(self) -> int | None:
        """Adapters that run at one time, all for None.

        Only graphs are large.  Without them there is one pass: in a validation ranks may hold different numbers of rows, and every pass
        through a sharded base is one that all ranks have to make.
        """
        return self.microbatch if torch.is_grad_enabled() else None

    def compute(self, device: torch.device) -> AbstractContextManager:
        """fp32 (or the weights' dtype) even where the step runs in bfloat16, unless the options allow that."""
        return nullcontext() if self.low else torch.autocast(device.type, enabled=False)


class Delta(ProbedObjective):
    """Relative error, mean squared error or 1 - cosine of delta embeddings."""

    name = "delta"

    def __init__(self, options: DeltaObjectiveOptions):
        super().__init__(options)
        self.loss = options.loss
        self._base_1F: Tensor | None = None

    def __call__(self, output: Output | AdaptedOutput | PredictedOutput, signal: Signal, batch: Batch) -> LossTerm:
        """Metrics: ``delta_cosine``, ``delta_ratio`` (size over the teacher's), ``delta_norm`` and ``delta_teacher_norm``."""
        counts = rows_that_count(batch)
        wanted: DeltaSignal = signal[Deltas]
        found = output.delta_BF if isinstance(output, PredictedOutput) else self._found(self.adapted(output), wanted)
        target = wanted.target_BF
        cosine = bounded_cosine(found, target)
        if self.loss == "relative":
            term = relative_error(found, target)
        elif self.loss == "mse":
            term = (found - target).square().mean(-1)
        else:
            term = 1 - cosine
        size, teacher = found.detach().norm(dim=-1), target.norm(dim=-1)
        number = counts.sum()
        numbers = {
            "delta_cosine": cosine.detach(),
            "delta_norm": size,
            "delta_teacher_norm": teacher,
            "delta_ratio": size / teacher.clamp_min(torch.finfo(teacher.dtype).tiny),
        }
        zero = torch.zeros_like(size)
        metrics = {name: (torch.where(counts, value, zero).sum(), number) for name, value in numbers.items()}
        return LossTerm(torch.where(counts, term, zero).sum(), metrics)

    def warning(self, validations: Sequence[Mapping[str, float]]) -> str | None:
        """Deltas that come nearer while held-out text gets worse: the probes are matched, and the model around them breaks."""
        seen = [v for v in validations if "ce" in v and "delta_cosine" in v]
        if len(seen) < 2:
            return None
        before, now = min(seen[:-1], key=lambda v: v["ce"]), seen[-1]
        if now["ce"] > before["ce"] + WORSE and now["delta_cosine"] > before["delta_cosine"]:
            return (
                "the delta cosine rises while held-out text gets worse: the generator matches the probes and breaks the model elsewhere; use more "
                "and more diverse probes with `tokens: all`, and add the objectives `tether` and `norm_penalty`"
            )
        return None

    def _found(self, adapted: AdaptedOutput, wanted: DeltaSignal) -> Tensor:
        read = partial(embed, adapted.run, probes=wanted.probes, options=wanted.represent)
        if wanted.represent.what == "likelihoods":
            read = partial(read, head=adapted.head)
        with self.compute(wanted.target_BF.device):
            if self._base_1F is None:
                # The base is frozen: once, in the dtype that the adapted passes have, since the difference is small.
                with torch.no_grad():
                    self._base_1F = read(None)
            return read(adapted.adapters, together=self.together) - self._base_1F


def bounded_cosine(found_NF: Tensor, target_NF: Tensor) -> Tensor:
    """Cosine ``[N]`` of N deltas of F numbers, with a found vector counted as at least :data:`SMALL` of the target's size.

    A generator begins at a delta of exactly zero, where the gradient of a plain cosine is unbounded.
    """
    teacher = target_NF.norm(dim=-1).clamp_min(torch.finfo(target_NF.dtype).tiny)
    # The norm's own gradient at zero is not a number.
    size = found_NF.square().sum(-1).clamp_min((SMALL * teacher).square()).sqrt()
    return (found_NF * target_NF).sum(-1) / (size * teacher)
