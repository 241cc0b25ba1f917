"""One micro-batch: forward, summed losses, backward.

The losses run *inside* the root module's forward.  When the root is sharded, its head and embeddings are whole only there, and
only losses made there let the root reduce their gradients (a loss outside leaves the head's gradient local, without an error).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from limbeck.errors import RunError
from limbeck.needs import Need, merge_needs
from limbeck.ops.fused import linear_cross_entropy
from limbeck.types import Batch, LossTerm, Metric, Objective, Pending, Signal, Teacher

Metrics = dict[str, Metric]


def _labels(objectives: Sequence[Objective]) -> list[str]:
    """Names of the objectives, numbered where two share one."""
    names = [o.name for o in objectives]
    return [n if names.count(n) == 1 else f"{n}.{names[:i].count(n)}" for i, n in enumerate(names)]


class TeacherRoot(nn.Module):
    """Calls a teacher's methods inside a module's forward, so that a sharded teacher's own root parameters are whole there."""

    def __init__(self, teacher: Teacher, network: nn.Module):
        super().__init__()
        self.network = network
        self._teacher = teacher

    def forward(self, method: str, *args: Any) -> Any:
        """``teacher.<method>(*args)``."""
        return getattr(self._teacher, method)(*args)


class TrainStep(nn.Module):
    """Student forward, every objective's sum, one backward.  The teacher is asked, never trained, and no part of the module."""

    def __init__(
        self,
        student: nn.Module,
        objectives: Sequence[Objective],
        teacher: Teacher | None = None,
        needs: Mapping[type[Need], Need] | None = None,
    ):
        super().__init__()
        self.student = student
        # Some have more than the protocol, and are asked for it by name.
        self.objectives: tuple[Any, ...] = tuple(objectives)
        self.labels = _labels(self.objectives)
        self.needs = dict(needs or {})
        self._check_sight()
        network = getattr(teacher, "module", None)
        if network is not None:
            network.requires_grad_(False).eval()
        # Behind a tuple: a registered submodule would be sharded, trained and saved with the student.
        self._teacher = (teacher, TeacherRoot(cast(Teacher, teacher), network) if network is not None else None)

    def _check_sight(self) -> None:
        """Objectives that look inside a student need one that shows itself."""
        blind = "needs" not in inspect.signature(self.student.forward).parameters
        for objective in self.objectives:
            if blind and (wanted := getattr(objective, "student_needs", ())):
                raise RunError(
                    f"objective '{objective.name}' looks inside the student ({type(wanted[0]).__name__}), and this kind of student "
                    "(one that makes adapters, say) shows only what comes out: take the objective out"
                )

    @property
    def teacher(self) -> Teacher | None:
        """The teacher, if there is one."""
        return self._teacher[0]

    @property
    def teacher_root(self) -> TeacherRoot | None:
        """The module through which a teacher's network in this process is called."""
        return self._teacher[1]

    def ask(self, method: str, *args: Any) -> Any:
        """Call a method of the teacher, without gradients."""
        with torch.no_grad():
            if self.teacher_root is not None:
                return self.teacher_root(method, *args)
            return getattr(self.teacher, method)(*args)

    def counts(self, batch: Batch) -> Tensor:
        """Number of positions each objective sums over, int64 ``[objectives]``, from the masks alone."""
        return torch.stack([torch.as_tensor(o.count(batch), dtype=torch.int64) for o in self.objectives])

    def weights(self, step: int) -> list[float]:
        """Each objective's weight in a step (from 0); one with a ``schedule`` is moved to it, and so is a student that has ``at_step``.

        Where either is in a step depends on nothing but the step: there is nothing to save.
        """
        getattr(self.student, "at_step", lambda step: None)(step)
        for objective in self.objectives:
            schedule = getattr(objective, "schedule", None)
            if schedule is not None:
                objective.weight = schedule.at(step)
        return [float(objective.weight) for objective in self.objectives]

    def _account(self, metrics: Metrics, index: int, term: LossTerm, count: Tensor | int, scale: float) -> Tensor:
        """Add a term's numbers to ``metrics``; returns the term's share of the loss."""
        label, weight = self.labels[index], self.objectives[index].weight
        share = term.sum * scale
        raw = term.sum.detach()
        pairs: Metrics = {
            f"{label}/raw": (raw, count),
            f"{label}/weighted": (raw * weight, count),
            "loss": (share.detach(), 0),
            **term.metrics,
        }
        if getattr(self.objectives[index], "schedule", None) is not None:
            pairs[f"{label}/weight"] = (weight, 1)
        for name, (total, number) in pairs.items():
            held = metrics.get(name, (0.0, 0))
            metrics[name] = (held[0] + total, held[1] + number)
        return share

    def submit(self, batch: Batch) -> Pending | None:
        """Ask a teacher that answers later; None if there is no such teacher."""
        early = getattr(self.teacher, "submit", None)
        return early(batch, self.needs) if early is not None and self.needs else None

    def answer(self, batch: Batch) -> tuple[Batch, Signal]:
        """The teacher's answer for one micro-batch, empty without a teacher; the batch with what was not answered masked."""
        pending = self.submit(batch)
        if pending is not None:
            return pending.result()
        return batch, self.ask("signal", batch, self.needs) if self.teacher is not None and self.needs else Signal()

    @property
    def previews(self) -> bool:
        """Whether an objective's loss depends on something that only the whole step shows."""
        return any(getattr(o, "previews", False) and not self._only_watched(o) for o in self.objectives)

    @torch.no_grad()
    def preview(self, batch: Batch) -> None:
        """Show a micro-batch of the coming step to the objectives that must have seen all of it; then :meth:`settle`."""
        self(batch, None, ())

    def score(self, batch: Batch) -> Tensor:
        """Summed cross-entropy of the student alone (what it has instead, where no text comes out): a number that says which weights these are."""
        return self(batch, None, None)[0]

    def forward(self, batch: Batch, signal: Signal | None, scales: Sequence[float] | None) -> tuple[Tensor, Metrics]:
        """``(sum_i scales[i] * objective_i, metrics)``; metrics are detached ``(sum, count)`` pairs, the loss has count 0.

        Without a signal it is a preview, without scales a score: here too, since a sharded root is whole nowhere else.
        """
        if scales is None:
            output = self.student(batch)
            if hasattr(output, "checksum"):
                return output.checksum, {}
            return linear_cross_entropy(output.hidden_BTD.flatten(0, 1), output.head, batch.labels_BT.flatten())[0], {}
        if signal is None:
            looking = [o for o in self.objectives if getattr(o, "previews", False) and not self._only_watched(o)]
            output = self.student(batch, merge_needs(need for o in looking for need in o.student_needs))
            for objective in looking:
                objective.preview(output, batch)
            return torch.zeros(()), {}
        active = [i for i, o in enumerate(self.objectives) if not (torch.is_grad_enabled() and self._only_watched(o))]
        inside = merge_needs(need for i in active for need in getattr(self.objectives[i], "student_needs", ()))
        output = self.student(batch, inside) if inside else self.student(batch)
        metrics: Metrics = {}
        shares = [
            self._account(metrics, i, self.objectives[i](output, signal, batch), self.objectives[i].count(batch), scales[i])
            for i in active
        ]
        return torch.stack(shares).sum(), metrics

    def settle(self, over_ranks: Callable[[Tensor], Tensor]) -> None:
        """After a step's last micro-batch: objectives that keep statistics of steps get those of all ranks."""
        for objective in self.objectives:
            mine = getattr(objective, "statistics", lambda: None)()
            if mine is not None:
                objective.settle(over_ranks(mine.cpu()))

    def forget(self) -> None:
        """Put away what objectives have counted in a step that is done again."""
        for objective in self.objectives:
            getattr(objective, "statistics", lambda: None)()

    @staticmethod
    def _only_watched(objective: Any) -> bool:
        """Whether a loss has weight 0 for good: it is measured in validations, and costs a training step nothing."""
        return objective.weight == 0 and getattr(objective, "schedule", None) is None

    def run(self, batch: Batch, signal: Signal, scales: Sequence[float]) -> Metrics:
        """Forward and backward of one micro-batch; gradients add up."""
        loss, metrics = self(batch, signal, scales)
        if torch.is_grad_enabled():
            loss.backward()
        return metrics


class StreamingTrainStep(TrainStep):
    """The teacher runs; inside its hooks each mixer's piece is made and backpropagated: one layer's graph at a time.

    The pieces' graphs are disjoint (one mixer each), which is what allows it.  The objective offers
    ``piece(mixer, layer, inputs_BTD, outputs_BTD, kwargs, batch) -> LossTerm``, the student ``mixers() -> {layer: module}``.
    """

    def __init__(self, student: nn.Module, objective: Any, teacher: Teacher):
        super().__init__(student, (objective,), teacher)
        self.mixers: dict[int, nn.Module] = dict(cast(Any, student).mixers())

    def answer(self, batch: Batch) -> tuple[Batch, Signal]:
        """Nothing: the teacher answers while it runs."""
        return batch, Signal()

    def score(self, batch: Batch) -> Tensor:
        """The summed loss of all mixers: they are called one by one here, and never by the student around them."""
        return torch.as_tensor(self.run(batch, Signal(), [1.0])["loss"][0])

    def run(self, batch: Batch, signal: Signal, scales: Sequence[float]) -> Metrics:
        """One pass of the teacher; every visited layer that has a mixer is trained on the spot."""
        objective, gradients = self.objectives[0], torch.is_grad_enabled()
        metrics: Metrics = {}
        count: list[Tensor | int] = [objective.count(batch)]

        def visit(layer: int, inputs_BTD: Tensor, outputs_BTD: Tensor, kwargs: dict[str, Any]) -> None:
            if layer not in self.mixers:
                return
            with torch.set_grad_enabled(gradients):
                term = objective.piece(self.mixers[layer], layer, inputs_BTD.detach(), outputs_BTD.detach(), kwargs, batch)
                # The positions are counted once, whatever the number of layers.
                share = self._account(metrics, 0, term, count.pop() if count else 0, scales[0])
                if gradients:
                    share.backward()

        self.ask("stream", batch, visit)
        return metrics
