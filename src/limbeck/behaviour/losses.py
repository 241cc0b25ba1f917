"""The losses of the plan's phases 4 and 5 as callables: the objectives of a recipe, on adapters that the caller already has."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.adapters.deltas import DeltaSignal
from limbeck.adapters.inject import Injector
from limbeck.adapters.output import AdaptedOutput
from limbeck.adapters.spec import Adapters
from limbeck.behaviour.opening import ProbeSource, open_base, open_probes, runner
from limbeck.config.parts.adapters import PAPER, RepresentationOptions
from limbeck.config.parts.objectives import OBJECTIVES, Ramp
from limbeck.errors import AdapterError
from limbeck.models.head import head_of
from limbeck.needs import AdapterFactors, Deltas
from limbeck.types import IGNORE, Batch, Signal

Result = tuple[Tensor, dict[str, float]]
"""The loss (a mean over adapters, with its gradient), and numbers to log."""


class _Objectives:
    """Objectives on generated adapters, weighted and summed, each adapter counting as one.

    The hooks that let adapters act in the base stay there: outside of a call they do nothing.
    """

    def __init__(self, base_model: Any, probes: ProbeSource, tokenizer: Any, represent: RepresentationOptions, options: dict[str, dict[str, Any]]):
        self.base = open_base(base_model)
        self.probes = open_probes(probes, tokenizer).to(self.base.device)
        self.represent = represent
        self._options = {label: OBJECTIVES.options(value["kind"]).model_validate(value) for label, value in options.items()}
        self._objectives = {label: OBJECTIVES.build(value) for label, value in self._options.items()}
        self._injector: Injector | None = None

    def weight(self, label: str, step: int) -> float:
        """Of one loss at a step from 0."""
        options: Any = self._options[label]
        return options.weight_at(step)

    def _sum(self, generated: Adapters, signal: Signal, step: int) -> Result:
        if self._injector is None or self._injector.spec.sites != generated.spec.sites:
            if self._injector is not None:
                self._injector.remove()
            self._injector = Injector(self.base, generated.spec)
        output = AdaptedOutput(generated, lambda: head_of(self.base), self._no_text, runner(self.base, self._injector))
        batch = _rows(len(generated), generated.tensors()[0].device)
        total = generated.tensors()[0].new_zeros(())
        numbers: dict[str, float] = {}
        for label, objective in self._objectives.items():
            term = objective(output, signal, batch)
            mean = term.sum / len(generated)
            total = total + self.weight(label, step) * mean
            numbers[label] = float(mean.detach())
            numbers |= {name: float(value) / float(count) for name, (value, count) in term.metrics.items()}
        return total, {"loss": float(total.detach()), **numbers}

    @staticmethod
    def _no_text() -> Tensor:
        raise AdapterError("this loss reads probes alone: losses on text (kl, ce) are objectives of a recipe")

    def _target(self, delta_teacher: Tensor, count: int) -> DeltaSignal:
        if delta_teacher.ndim != 2 or len(delta_teacher) != count or delta_teacher.dtype != torch.float32:
            raise AdapterError(
                f"delta_teacher is {delta_teacher.dtype} {list(delta_teacher.shape)}, and {count} adapters were generated: wanted float32 [{count}, F]"
            )
        return DeltaSignal(delta_teacher.to(self.probes.ids_KT.device), self.probes, self.represent)


class MultiTaskLoss(_Objectives):
    """``lambda_weight * L_weight + lambda_delta * L_delta`` (the plan's phase 4); lambda_delta rises from 0 over ``ramp_steps``.

    Args:
        base_model: the frozen base, or its folder.
        probes: tokens, or texts with ``tokenizer``: those on which the teachers' deltas were measured, read by the same ``represent``.
        weight_loss: as the objective ``weights`` takes it; ``mse`` is Drag-and-Drop's, which means something only for teachers that
            began alike.
        delta_loss: as the objective ``delta`` takes it.
        microbatch: adapters whose probes run at one time.
    """

    def __init__(
        self,
        base_model: Any,
        probes: ProbeSource,
        *,
        tokenizer: Any = None,
        lambda_weight: float = 1.0,
        lambda_delta: float = 0.1,
        ramp_steps: int = 0,
        weight_loss: Literal["mse", "canonical", "product"] = "mse",
        delta_loss: Literal["mse", "cosine", "relative"] = "mse",
        represent: RepresentationOptions = PAPER,
        microbatch: int | None = None,
    ):
        ramp: float | Ramp = Ramp(ramp=(0.0, lambda_delta), steps=ramp_steps) if ramp_steps else lambda_delta
        options: dict[str, dict[str, Any]] = {
            "L_weight": {"kind": "weights", "loss": weight_loss, "weight": lambda_weight},
            "L_delta": {"kind": "delta", "loss": delta_loss, "weight": ramp, "microbatch": microbatch},
        }
        super().__init__(base_model, probes, tokenizer, represent, options)

    def __call__(self, generated: Adapters, teacher: Adapters, delta_teacher: Tensor, *, step: int = 0) -> Result:
        """The loss of N generated adapters against N teachers and their deltas, ``delta_teacher [N, F]``.

        Logged: ``L_weight``, ``L_delta``, ``lambda_delta``, ``delta_cosine``, ``delta_norm``, ``delta_teacher_norm``, ``delta_ratio`` and
        ``lora_ratio``.

        Raises:
            AdapterError: adapters or deltas that do not fit each other.
        """
        if len(generated) != len(teacher):
            raise AdapterError(f"{len(generated)} adapters were generated, and there are {len(teacher)} teachers: one for each is needed")
        signal = Signal({AdapterFactors: teacher, Deltas: self._target(delta_teacher, len(generated))})
        loss, numbers = self._sum(generated, signal, step)
        return loss, {**numbers, "lambda_delta": self.weight("L_delta", step)}


class DeltaOnlyLoss(_Objectives):
    """Behaviour alone (the plan's phase 5, B1): the delta's error, a penalty on the LoRA's size, and a KL tether to the base on the probes.

    The last layer's state at the last token of few probes leaves most of a model free: without tether, and with :data:`PAPER`, a generator
    learns to match it and to ruin the rest.
    """

    def __init__(
        self,
        base_model: Any,
        probes: ProbeSource,
        *,
        tokenizer: Any = None,
        delta_loss: Literal["mse", "cosine", "relative"] = "relative",
        norm_penalty: float = 0.0,
        tether: float = 0.0,
        represent: RepresentationOptions = PAPER,
        microbatch: int | None = None,
    ):
        options: dict[str, dict[str, Any]] = {"L_delta": {"kind": "delta", "loss": delta_loss, "microbatch": microbatch}}
        if norm_penalty:
            options["L_norm"] = {"kind": "norm_penalty", "weight": norm_penalty}
        if tether:
            options["L_tether"] = {"kind": "tether", "weight": tether, "microbatch": microbatch}
        super().__init__(base_model, probes, tokenizer, represent, options)

    def __call__(self, generated: Adapters, delta_teacher: Tensor) -> Result:
        """The loss of N generated adapters against their teachers' deltas, ``delta_teacher [N, F]``.

        Raises:
            AdapterError: deltas that do not fit the adapters.
        """
        return self._sum(generated, Signal({Deltas: self._target(delta_teacher, len(generated))}), 0)


def _rows(count: int, device: torch.device) -> Batch:
    """One row for each adapter, without text."""
    empty = torch.zeros(count, 1, dtype=torch.int64, device=device)
    return Batch(empty, empty + IGNORE, empty, empty, adapters_B=torch.arange(count, device=device))
