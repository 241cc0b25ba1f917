"""Rates of mixers, measured in turns: what else the machine does falls on all of them, and their ratios hold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from limbeck.evaluation.decode import evaluating
from limbeck.evaluation.speed import cache_bytes, decode_rates
from limbeck.models.head import head_of
from limbeck.models.packed import forward_packed
from limbeck.ops.fused import linear_kl
from limbeck.types import Batch

WARMUP = 1
"""Rounds before the clocks count."""


def training_seconds(models: Mapping[str, PreTrainedModel], teacher: PreTrainedModel, batch: Batch, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round's distillation step of each model: forward, fused KL and backward in bfloat16 autocast, all parameters.

    The teacher's answer is given, and there is no optimiser step: both are the same for all.
    """
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        theirs_ND, head = forward_packed(teacher, batch).flatten(0, 1), head_of(teacher)
    mask_N = batch.label_mask_BT.flatten()
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(WARMUP + rounds):
        for name, model in models.items():
            model.train().requires_grad_(True)
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                loss, _ = linear_kl(forward_packed(model, batch).flatten(0, 1), head_of(model), theirs_ND, head, mask_N)
            (loss / mask_N.sum()).backward()
            if turn >= WARMUP:
                seconds[name].append(time.perf_counter() - started)
            model.zero_grad(set_to_none=True)
    return seconds


def measure(
    models: Mapping[str, PreTrainedModel], teacher: PreTrainedModel, batch: Batch, *, contexts: tuple[int, ...], rounds: int, tokens: int
) -> dict[str, dict[str, float]]:
    """Model -> ``training tokens/s``, ``decode tokens/s at N`` and ``state bytes at N``; ``teacher`` is among the decoding ones.

    A mixer whose state grows with the context must be prefilled token by token: it decodes at the first context alone.
    """
    spent = training_seconds(models, teacher, batch, rounds)
    found: dict[str, dict[str, float]] = {
        name: {"training tokens/s": batch.input_ids_BT.numel() / statistics.median(times)} for name, times in spent.items()
    }
    found["teacher"] = {}
    everyone = {**models, "teacher": teacher}
    for name, model in everyone.items():
        model.requires_grad_(False)
        found[name] |= {f"state bytes at {context}": cache_bytes(model, context)["bytes"] for context in contexts}
    grows = {name for name, model in models.items() if cache_bytes(model, contexts[-1])["bytes"] > cache_bytes(model, contexts[0])["bytes"]}
    with evaluating(everyone):
        for context in contexts:
            chosen = {name: model for name, model in everyone.items() if context == contexts[0] or name not in grows}
            for name, entries in decode_rates(chosen, [context], tokens=tokens).items():
                found[name][f"decode tokens/s at {context}"] = entries[0]["tokens_per_second"]
    return found
