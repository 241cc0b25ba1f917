"""Decode rate and cache size as functions of the context.

No long prefill is paid: a short one makes every cache layer, then softmax layers are filled up with random keys and values and
mixers, whose states have stopped growing, are told how much they have seen.  Rates do not depend on what the numbers say.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from limbeck.errors import ModelError
from limbeck.evaluation.decode import new_cache, step
from limbeck.models.structure import LINEAR_SLOTS, AttentionView, layer_list, mixing_slot

PROBED = 8
"""Tokens after which a cache is looked at."""
WARMUP = 2
"""Steps of each model before its clock starts."""


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """What mixes the tokens of each decoder layer: softmax attention, a mixer of ours, or a family's own linear attention."""
    return [getattr(layer, mixing_slot(layer)) for layer in layer_list(model)]


def attention_kinds(model: PreTrainedModel) -> list[str]:
    """``softmax``, the mixer's kind, or the class of a family's own linear attention, layer by layer."""
    own = {id(getattr(layer, name)) for layer in layer_list(model) for name in [mixing_slot(layer)] if name in LINEAR_SLOTS}
    return [
        module.options.kind if hasattr(module, "state_bytes") else type(module).__name__ if id(module) in own else "softmax"
        for module in attention_modules(model)
    ]


def cache_bytes(model: PreTrainedModel, context: int, *, dtype_bytes: int = 2) -> dict[str, int]:
    """Bytes of one sequence's cache after ``context`` tokens, from the modules: ``kv`` of softmax layers, ``state`` of mixers.

    A sliding window keeps its last ``window - 1`` tokens: the next token is the window's last place.  Of a family with linear
    attention of its own the cache itself is looked at.
    """
    if set(attention_kinds(model)) - {"softmax"} and not any(hasattr(module, "state_bytes") for module in attention_modules(model)):
        return _own_cache_bytes(model, context, dtype_bytes)
    kv = state = 0
    for index, attention in enumerate(attention_modules(model)):
        state_bytes = getattr(attention, "state_bytes", None)
        if state_bytes is not None:
            state += state_bytes(context, dtype_bytes)
            continue
        facts = AttentionView(attention, model.config.get_text_config(decoder=True), index).facts
        kept = min(context, facts.sliding_window - 1) if facts.sliding_window else context
        kv += 2 * facts.num_kv_heads * facts.head_dim * kept * dtype_bytes
    return {"context": context, "bytes": kv + state, "kv": kv, "state": state}


def _own_cache_bytes(model: PreTrainedModel, context: int, dtype_bytes: int) -> dict[str, int]:
    """From a cache after a few tokens: keys and values grow with the context, any other tensor stays as it is."""
    cache = new_cache(model)
    step(model, torch.zeros(1, PROBED, dtype=torch.int64, device=model.device), cache)
    kv = state = 0
    for layer in cache.layers:
        keys = getattr(layer, "keys", None)
        if keys is not None:
            kv += 2 * keys.numel() // PROBED * context * dtype_bytes
        else:
            held = [value for part in vars(layer).values() for value in (part.values() if isinstance(part, dict) else [part])]
            state += sum(value.numel() for value in held if isinstance(value, torch.Tensor)) * dtype_bytes
    return {"context": context, "bytes": kv + state, "kv": kv, "state": state}


@torch.no_grad()
def filled_cache(model: PreTrainedModel, context: int, *, seed: int = 0) -> DynamicCache:
    """A cache as after ``context`` tokens, for one sequence, without running them."""
    generator = torch.Generator(device=model.device).manual_seed(seed)
    cache = new_cache(model)
    prefill = _prefill_length(model, context)
    ids_BT = torch.randint(model.config.get_text_config().vocab_size, (1, prefill), device=model.device, generator=generator)
    step(model, ids_BT, cache)
    kinds = attention_kinds(model)
    for index, layer in enumerate(cache.layers):
        keys = getattr(layer, "keys", None)
        # A recurrent state of a family's own is as large after a few tokens as after many.
        if hasattr(layer, "seen"):
            layer.seen = context
        elif keys is not None:
            shape = (*keys.shape[:-2], context - prefill, keys.shape[-1])
            more = [torch.randn(shape, dtype=keys.dtype, device=keys.device, generator=generator) for _ in range(2)]
            layer.update(*more)
        elif kinds[index] == "softmax":
            raise ModelError(f"layer {index}: the decode rate cannot fill a cache layer of class {type(layer).__name__}")
    return cache


def _prefill_length(model: PreTrainedModel, context: int) -> int:
    """The least power of two after which no mixer's state grows any more (all of the context where it never stops)."""
    mixers = [attention for attention in attention_modules(model) if hasattr(attention, "state_bytes")]
    length = 8
    while length < context and any(mixer.state_bytes(length) < mixer.state_bytes(context) for mixer in mixers):
        length *= 2
    return min(length, context)


@torch.no_grad()
def decode_rates(
    models: Mapping[str, PreTrainedModel],
    contexts: Sequence[int],
    *,
    tokens: int = 16,
    seed: int = 0,
) -> dict[str, list[dict[str, Any]]]:
    """Tokens a second of one sequence at each context, the median over ``tokens`` steps.

    Models take turns token by token in one process, so that what else the machine does falls on all of them and ratios hold.
    The caches are transformers' own: a softmax layer's is copied at every token.
    """
    rates: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    for context in contexts:
        caches = {name: filled_cache(model, context, seed=seed) for name, model in models.items()}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(WARMUP + tokens):
            for name, model in models.items():
                token_BT = torch.tensor([[turn]], device=model.device)
                started = _now(model.device)
                step(model, token_BT, caches[name])
                if turn >= WARMUP:
                    seconds[name].append(_now(model.device) - started)
        for name, times in seconds.items():
            median = statistics.median(times)
            rates[name].append({"context": context, "tokens_per_second": 1 / median, "seconds": median, "count": tokens})
    return rates


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
