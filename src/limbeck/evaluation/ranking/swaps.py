"""Candidates that differ from one model in a few attention modules, scored together.

All of them share the pass below their first swapped layer: what enters each layer is computed once a batch, and a candidate goes on
from there.  That is exact, and it is checked on the first batch (a family whose layers read more than what enters them would
not be continued).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.evaluation.ranking.scoring import Score, ScoreTally, Scoring
from limbeck.models.head import head_of
from limbeck.models.packed import FLAG, forward_packed, leak_probe
from limbeck.models.structure import attention_slot, decoder_layers
from limbeck.types import Batch

Layers = tuple[int, ...]


@dataclass(frozen=True)
class Sweep:
    """``scores`` of the candidates, ``baseline`` of the model without any swap, and what it cost in tokens of whole passes."""

    scores: dict[Layers, Score]
    baseline: Score
    tokens: int
    shared: bool


@contextmanager
def swapped(model: Any, modules: Mapping[int, nn.Module]) -> Iterator[None]:
    """Other attention modules in some layers for a while."""
    layers = decoder_layers(model)
    held = {index: getattr(layers[index], attention_slot(layers[index])) for index in modules}
    slots = {index: attention_slot(layers[index]) for index in modules}
    try:
        for index, module in modules.items():
            setattr(layers[index], slots[index], module)
        yield
    finally:
        for index, module in held.items():
            setattr(layers[index], slots[index], module)


def entering(model: Any, batch: Batch) -> tuple[list[Tensor], Tensor]:
    """What enters each decoder layer, as the family's own code hands it on, and the final hidden states ``[B, T, D]``."""
    _probe(model)
    found: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in decoder_layers(model)]
    try:
        final_BTD = forward_packed(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found, final_BTD


def _probe(model: Any) -> None:
    """Probe a model that was not probed yet before anything is hooked: the first packed pass would do it, and be seen by the hooks."""
    if not hasattr(model, FLAG):
        leak_probe(model)


def continued(model: Any, batch: Batch, layer: int, hidden: Tensor) -> Tensor:
    """Final hidden states ``[B, T, D]`` when ``hidden [B, T, D]`` (or ``[B, T, S, D]`` of S streams) enters ``layer``; the layers below do not run."""
    below: Any = list(decoder_layers(model))[:layer]

    def through(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden

    try:
        for module in below:
            module.forward = through
        return forward_packed(model, batch)
    finally:
        for module in below:
            vars(module).pop("forward", None)


def _continues(model: Any, batch: Batch, states: list[Tensor], final_BTD: Tensor) -> bool:
    """Whether a pass that begins at any layer ends where the whole one did."""
    try:
        ends = [continued(model, batch, layer, states[layer]) for layer in {1, len(states) - 1} if 0 < layer < len(states)]
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):
        return False
    return all(bool((end - final_BTD).abs().max() <= 1e-5 * final_BTD.abs().max()) for end in ends)


@torch.no_grad()
def sweep(
    model: Any,
    candidates: Mapping[Layers, Mapping[int, nn.Module]],
    scoring: Scoring,
    *,
    done: Callable[[], object] = lambda: None,
) -> Sweep:
    """Score the model with each candidate's modules in the place of its own; ``done`` hears of each piece of ``scoring``.

    ``tokens`` counts a pass that begins at layer ``l`` of ``L`` as ``(L - l) / L`` of its tokens; the teacher's own pass over the
    scoring data is not in it.
    """
    num_layers = len(decoder_layers(model))
    tallies = {layers: ScoreTally() for layers in candidates}
    baseline, tokens, shared = ScoreTally(), 0.0, True
    training = model.training
    model.eval()
    with scoring.compute:
        for number, piece in enumerate(scoring):
            states, final_BTD = entering(model, piece.batch)
            size = piece.batch.num_tokens
            tokens += size
            if number == 0:
                shared = _continues(model, piece.batch, states, final_BTD)
            baseline.add(piece, final_BTD, head_of(model), scoring.teacher_head)
            for layers, modules in candidates.items():
                first = min(modules, default=0) if shared else 0
                with swapped(model, modules):
                    end_BTD = continued(model, piece.batch, first, states[first])
                tallies[layers].add(piece, end_BTD, head_of(model), scoring.teacher_head)
                tokens += size * (num_layers - first) / num_layers
            done()
    model.train(training)
    return Sweep({layers: tally.result() for layers, tally in tallies.items()}, baseline.result(), round(tokens), shared)


@torch.no_grad()
def residuals(teacher: Any, mixers: Mapping[int, nn.Module], scoring: Scoring) -> dict[int, dict[str, float]]:
    """Relative error of each mixer on the teacher's own input, ``|t - s|^2 / |t|^2`` over tokens, on text and on recall rows."""
    errors: dict[int, dict[str, list[Tensor]]] = {layer: {"text": [], "recall": []} for layer in mixers}
    powers: dict[int, dict[str, list[Tensor]]] = {layer: {"text": [], "recall": []} for layer in mixers}

    def hook(layer: int, part: str, mask_BT: Tensor) -> Any:
        def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            theirs_BTD = output[0] if isinstance(output, tuple) else output
            ours_BTD = mixers[layer](*args, **kwargs)[0]
            mask = mask_BT if mask_BT.shape == theirs_BTD.shape[:2] else torch.ones_like(theirs_BTD[..., 0], dtype=torch.bool)
            errors[layer][part].append((theirs_BTD.float() - ours_BTD.float())[mask].square().sum())
            powers[layer][part].append(theirs_BTD.float()[mask].square().sum())

        return measure

    layers = decoder_layers(teacher)
    _probe(teacher)
    with scoring.compute:
        for piece in scoring:
            part = "text" if piece.part == "text" else "recall"
            handles = [
                getattr(layers[i], attention_slot(layers[i])).register_forward_hook(hook(i, part, piece.batch.token_mask_BT), with_kwargs=True)
                for i in mixers
            ]
            try:
                forward_packed(teacher, piece.batch)
            finally:
                for handle in handles:
                    handle.remove()
    return {
        layer: {part: float(torch.stack(errors[layer][part]).sum() / torch.stack(powers[layer][part]).sum()) for part in ("text", "recall")}
        for layer in mixers
    }
