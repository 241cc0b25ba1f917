"""One step of training by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from limbeck.adapters.spec import Adapters
from limbeck.agentic.hypernetwork import AgenticHyperNetwork
from limbeck.agentic.injection import injector_of
from limbeck.agentic.losses import signal_of
from limbeck.errors import DataError, RunError
from limbeck.models.head import head_of
from limbeck.models.packed import forward_packed, rows_seen
from limbeck.ops.topk_divergence import linear_topk_divergence
from limbeck.types import IGNORE, Batch, TopKSignal

TeacherCall = Callable[[Tensor], Any]
"""``input_ids [B, T]`` -> logits ``[B, T, V]``, something that has them as ``.logits`` (a transformers model), or a signal."""


def train_step(
    batch: Mapping[str, Tensor],
    hypernetwork: AgenticHyperNetwork,
    student: Any,
    teacher: TeacherCall,
    optimizer: torch.optim.Optimizer,
    *,
    k: int = 128,
    clip: float | None = 1.0,
) -> dict[str, float]:
    """Prompts -> LoRAs -> the student's states on the trajectories -> top-k KL to the teacher -> one step of the hypernetwork alone.

    Nothing is generated: teacher and student score the trajectories.  No gradient is made for the student's weights, and its logits never
    exist all at once.

    Args:
        batch: ``input_ids [B, T]``, right-padded with -1.  ``labels [B, T]`` where given: the tokens themselves where they are targets and -100
            elsewhere, not shifted (as ``windows.arrow`` has them); by default every token but the first.  ``condition_ids [B, C]`` where given:
            the issues, padded with -1; by default the first tokens of the rows, as many as the hypernetwork reads.  Other keys are left alone.
        optimizer: of parameters of the hypernetwork.
        clip: of the gradient's norm; None for no clipping.

    Returns:
        ``loss`` (nats a token), ``agreement`` of the likeliest tokens, ``mass`` of the teacher's k, ``tail_gap``, ``grad_norm`` before clipping, and
        ``tokens`` that counted.

    Raises:
        DataError: a batch without ``input_ids``, of shapes that do not fit, or without a target.
        RunError: an optimiser of something else, or a gradient that is not finite (nothing is changed then).
    """
    trained = list(hypernetwork.parameters())
    _check_optimizer(optimizer, trained)
    rows, condition = _rows(batch), _condition(batch, hypernetwork.tokens)
    lora = hypernetwork(*hypernetwork.embed(condition))
    hidden_BTD = _hidden(student, rows, lora)
    with torch.no_grad():
        signal = _signal(teacher, rows, k)
    loss, found = linear_topk_divergence(hidden_BTD.flatten(0, 1), head_of(student), signal, k=k)
    optimizer.zero_grad(set_to_none=True)
    (loss / found.count).backward(inputs=trained)
    norm = torch.nn.utils.clip_grad_norm_(trained, float("inf") if clip is None else clip)
    if not bool(norm.isfinite()):
        raise RunError("the gradient is not finite: no step was made; look for NaN in the teacher's answers, or lower the learning rate")
    optimizer.step()
    sums = {"loss": found.loss, "agreement": found.agreement, "mass": found.mass, "tail_gap": found.tail_gap}
    means = {name: float(value / found.count) for name, value in sums.items() if value is not None}
    return {**means, "grad_norm": float(norm), "tokens": float(found.count)}


def _check_optimizer(optimizer: torch.optim.Optimizer, trained: list[torch.nn.Parameter]) -> None:
    own = {id(parameter) for parameter in trained}
    if not all(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise RunError("optimizer: it holds parameters that are not the hypernetwork's, and the student is frozen: give it hypernetwork.parameters()")


def _rows(batch: Mapping[str, Tensor]) -> Batch:
    """Each row a document, with the token that every position must predict."""
    if "input_ids" not in batch:
        raise DataError(f"batch: it has no `input_ids`; found {', '.join(map(str, batch)) or 'nothing'}")
    ids = batch["input_ids"]
    targets = batch.get("labels", ids.masked_fill(ids < 0, IGNORE))
    if ids.ndim != 2 or targets.shape != ids.shape:
        raise DataError(f"batch: input_ids are {list(ids.shape)} and labels {list(targets.shape)}; both are [rows, tokens]")
    real = ids >= 0
    if not bool((real.int().diff(dim=1) <= 0).all()):
        raise DataError("batch.input_ids: a row has tokens behind -1: pad rows at their ends")
    labels = torch.full_like(ids, IGNORE)
    labels[:, :-1] = torch.where(real[:, 1:], targets[:, 1:], IGNORE)
    wrong = labels != IGNORE
    if not bool(wrong.any()):
        raise DataError("batch.labels: no token is a target: rows of which nothing counts are to be left out")
    if not torch.equal(labels[wrong], ids.roll(-1, 1)[wrong]):
        raise DataError("batch.labels: a label is not the token at its own place: labels are not shifted, and -100 where a token is no target")
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    # Padding begins again at 0, as a document of its own.
    positions = torch.where(real, place, place - real.sum(1, keepdim=True))
    return Batch(ids.clamp_min(0), labels, positions, torch.where(real, 0, -1))


def _condition(batch: Mapping[str, Tensor], tokens: int) -> Tensor:
    """What is read of each row, with a warning where that is the same for all."""
    given = batch.get("condition_ids")
    ids = batch["input_ids"]
    if given is not None and (given.ndim != 2 or len(given) != len(ids)):
        raise DataError(f"batch.condition_ids: {list(given.shape)} for {len(ids)} rows; wanted [{len(ids)}, tokens]")
    condition = (ids if given is None else given)[:, :tokens]
    if len(condition) > 1 and bool((condition == condition[0]).all()):
        what = f"the first {condition.shape[1]} tokens" if given is None else "condition_ids"
        warnings.warn(
            f"{what} are the same in all {len(condition)} rows (a scaffold's system prompt?): every row gets the same LoRA, and the hypernetwork cannot "
            "learn to tell them apart: give the issues as batch['condition_ids']",
            stacklevel=3,
        )
    return condition


def _hidden(student: Any, batch: Batch, lora: Adapters) -> Tensor:
    seen = rows_seen(student, batch)
    with injector_of(student, lora.spec).active(lora if seen is None else lora.pick(seen)):
        return forward_packed(student, batch)


def _signal(teacher: TeacherCall, batch: Batch, k: int) -> TopKSignal:
    answer = teacher(batch.input_ids_BT)
    answer = getattr(answer, "logits", answer)
    if not isinstance(answer, TopKSignal):
        return signal_of(answer, k, batch.label_mask_BT)
    wanted = batch.label_mask_BT.flatten().nonzero().flatten()
    if not torch.equal(answer.rows_n.to(wanted.device), wanted):
        raise DataError(f"teacher: {len(answer.rows_n)} rows in its signal, and {len(wanted)} targets: it must answer for exactly those, in order")
    return answer.to(wanted.device)
