"""Delta embeddings by name: ``delta(M, base) = v(M) - v(base)``, measured or differentiable.

By default ``v`` is that of Delta Activations (Xu et al. 2025): the last layer's state at the last token, averaged over the probes, ``F`` =
model width.  ``represent`` reads more: with ``RepresentationOptions()`` every token of every probe, ``F`` = probes x tokens x width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from limbeck.adapters.delta_store import DeltaCache, adapter_key, measuring_digest, tensor_digest
from limbeck.adapters.deltas import Probes, embed, measured
from limbeck.adapters.functional import FunctionalLoRA
from limbeck.adapters.output import RunBase
from limbeck.adapters.spec import Adapters
from limbeck.behaviour.opening import (
    AdapterSource,
    ProbeSource,
    adapter_names,
    injected,
    open_adapters,
    open_base,
    open_probes,
    runner,
)
from limbeck.config.parts.adapters import PAPER, RepresentationOptions
from limbeck.errors import AdapterError
from limbeck.models.hidden import hidden_states
from limbeck.models.loading import fingerprint, resolve_source


@torch.no_grad()
def compute_base_activation(
    model: Any, tokenizer: Any, probes: ProbeSource, *, represent: RepresentationOptions = PAPER, length: int = 256
) -> np.ndarray:
    """``v(base)``, float32 ``[F]``.

    Args:
        model: a transformers model, or its folder.
        tokenizer: the base's, or its folder; None if ``probes`` are tokens already.
        probes: texts, such as those of ``create_generic_probes()``.
        represent: what is read.
        length: tokens of a probe at most.

    Raises:
        LimbeckError: a folder that cannot be loaded, no probes, or a model in training mode.
    """
    found = open_probes(probes, tokenizer, length=length)
    base = open_base(model)
    return _base(runner(base, None), found.to(base.device), represent).cpu().numpy()


@torch.no_grad()
def compute_adapter_delta(
    model: Any,
    tokenizer: Any,
    probes: ProbeSource,
    adapters: AdapterSource,
    *,
    base_activation: np.ndarray | Tensor | None = None,
    represent: RepresentationOptions = PAPER,
    length: int = 256,
    together: int = 8,
    cache: DeltaCache | None = None,
) -> np.ndarray:
    """How adapters move the base: float32 ``[F]`` of one PEFT folder, ``[N, F]`` of several or of ``Adapters``.

    The base is loaded once, ``together`` adapters run in one forward pass, and nothing of one is left when the next is read.

    Args:
        base_activation: ``[F]``, of :func:`compute_base_activation` with the same probes; measured here by default.
        cache: keeps each delta (and ``v(base)``) under the key of everything that it depends on; its manifest maps the folders to keys.

    Raises:
        LimbeckError: adapters made for another model, broken or of several shapes, or a ``base_activation`` of another size.
    """
    found, base = open_probes(probes, tokenizer, length=length), open_base(model)
    found = found.to(base.device)
    lot = open_adapters(adapters, base)
    numbers: dict[int, np.ndarray] = {}
    measuring = "" if cache is None else measuring_digest({"fingerprint": _identity(model, base)}, found, represent, "float32")
    keys = [] if cache is None else [adapter_key(lot, i, measuring) for i in range(len(lot))]
    if cache is not None:
        numbers = {i: held for i, key in enumerate(keys) if (held := cache.get(key)) is not None}
    missing = [i for i in range(len(lot)) if i not in numbers]
    if missing:
        with injected(base, lot.spec) as run:
            started = _started(run, found, represent, base_activation, cache, measuring)
            for part, deltas in measured(run, lot, missing, found, represent, started, together=together):
                numbers |= dict(zip(part, deltas.cpu().numpy(), strict=True))
    stacked = np.stack([numbers[i] for i in range(len(lot))])
    if not np.isfinite(stacked).all():
        raise AdapterError(f"adapter {int(np.argmin(np.isfinite(stacked).all(1)))} gives a delta that is not finite: it is broken")
    if cache is not None:
        _keep(cache, {key: stacked[i] for i, key in enumerate(keys)}, adapter_names(adapters), keys)
    return stacked[0] if isinstance(adapters, str | Path) else stacked


def compute_delta_embedding(
    base_model: Any,
    generated_lora: Adapters,
    probes: ProbeSource,
    *,
    tokenizer: Any = None,
    base_activation: np.ndarray | Tensor | None = None,
    represent: RepresentationOptions = PAPER,
    length: int = 256,
) -> Tensor:
    """Deltas ``[N, F]`` (fp32) of N generated LoRAs, with their gradient: all N and all probes in one batched forward of the frozen base.

    ``base_activation [F]`` is measured here by default.

    Raises:
        LimbeckError: LoRAs that do not fit the model, or a ``base_activation`` of another size.
    """
    base = open_base(base_model)
    found = open_probes(probes, tokenizer, length=length).to(base.device)
    with injected(base, generated_lora.spec) as run:
        return embed(run, generated_lora, found, represent) - _started(run, found, represent, base_activation)


def compute_delta_differentiable(
    model: Any,
    adapters: Adapters,
    probes: ProbeSource,
    *,
    tokenizer: Any = None,
    base_activation: np.ndarray | Tensor | None = None,
    represent: RepresentationOptions = PAPER,
    length: int = 256,
) -> Tensor:
    """:func:`compute_delta_embedding` by ``torch.func.functional_call``: one adapter at a time, where ``model`` is a :class:`FunctionalLoRA`.

    The slow reference: same numbers, same gradients.  Of a model or its folder it is :func:`compute_delta_embedding` itself.

    Raises:
        LimbeckError: as there, or a PEFT model of another scale than the adapters'.
    """
    if not isinstance(model, FunctionalLoRA):
        return compute_delta_embedding(
            model, adapters, probes, tokenizer=tokenizer, base_activation=base_activation, represent=represent, length=length
        )
    base = open_base(model.model)
    _check_scale(model, adapters)
    found = open_probes(probes, tokenizer, length=length).to(base.device)
    run = _functional_run(model)
    return embed(run, adapters, found, represent) - _started(run, found, represent, base_activation)


@torch.no_grad()
def _base(run: RunBase, probes: Probes, represent: RepresentationOptions) -> Tensor:
    if represent.what == "likelihoods":
        raise AdapterError("represent: `what: likelihoods` samples continuations: run a measure_deltas stage, which does")
    return embed(run, None, probes, represent)[0]


def _started(
    run: RunBase,
    probes: Probes,
    represent: RepresentationOptions,
    given: np.ndarray | Tensor | None,
    cache: DeltaCache | None = None,
    measuring: str = "",
) -> Tensor:
    """``v(base)``: what the caller has, what the cache has, or measured now."""
    device = probes.ids_KT.device
    if given is None and cache is not None:
        given = cache.get(f"base-{measuring}")
    if given is None:
        found = _base(run, probes, represent)
        if cache is not None:
            cache.put(f"base-{measuring}", found.cpu().numpy())
        return found
    held = torch.as_tensor(given, dtype=torch.float32, device=device)
    layers = len(represent.layers) if represent.join == "concat" else 1
    tokens = probes.ids_KT.shape[1] if represent.tokens == "all" else 1
    count = (len(probes) if represent.per_probe else 1) * tokens * layers
    if held.ndim != 1 or len(held) % count:
        raise AdapterError(
            f"base_activation is {list(held.shape)}, and with these probes and this representation it is [{count} x width]: "
            "compute it by compute_base_activation with the same ones"
        )
    return held


def _identity(source: Any, base: nn.Module) -> dict[str, str]:
    """What tells one base from another: its files, or the tensors of one that was never saved."""
    if isinstance(source, str | Path):
        return fingerprint(resolve_source(str(source)))
    return {"state": tensor_digest(base.state_dict())}


def _keep(cache: DeltaCache, numbers: dict[str, np.ndarray], names: Sequence[str], keys: Sequence[str]) -> None:
    manifest = cache.manifest
    if "adapters" in manifest:
        raise AdapterError(f"{cache.folder}: is what a measure_deltas stage made, and is left as it is: name another folder for the cache")
    for key, delta in numbers.items():
        if key not in cache:
            cache.put(key, delta)
    # Adapters that lie in memory have no name to be listed by.
    named = zip(names, keys, strict=True) if names else ()
    entries = {name: {"key": key, "file": f"{key}.npy", "norm": float(np.linalg.norm(numbers[key]))} for name, key in named}
    if any(manifest.get(name) != entry for name, entry in entries.items()):
        cache.write_manifest({**manifest, **entries})


class _States(nn.Module):
    """A PEFT model whose forward gives hidden states: something that ``functional_call`` can run with other parameters."""

    def __init__(self, peft: nn.Module):
        super().__init__()
        self.peft = peft

    def forward(self, ids_BT: Tensor, layers: Sequence[int], final_norm: bool) -> list[Tensor]:
        return hidden_states(self.peft.get_base_model(), ids_BT, layers, final_norm=final_norm)


def _functional_run(functional: FunctionalLoRA) -> RunBase:
    states = _States(functional.model)

    def run(ids_BT: Tensor, layers: Sequence[int], final_norm: bool, adapters: Adapters | None) -> list[Tensor]:
        if adapters is None:
            with functional.model.disable_adapter():
                return states(ids_BT, layers, final_norm)
        found = []
        for index, rows in enumerate(ids_BT.chunk(len(adapters))):
            weights = {f"peft.{name}": weight for name, weight in functional.apply_lora_weights(adapters, index).items()}
            found.append(functional_call(states, weights, (rows, layers, final_norm)))
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    return run


def _check_scale(functional: FunctionalLoRA, adapters: Adapters) -> None:
    """PEFT scales by its own config, whatever the adapters say."""
    for module in functional.model.modules():
        scaling: Any = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and functional.adapter_name in scaling and abs(scaling[functional.adapter_name] - adapters.spec.scale) > 1e-9:
            raise AdapterError(
                f"the PEFT model scales its LoRA by {scaling[functional.adapter_name]:g}, and these adapters are scaled by {adapters.spec.scale:g}: "
                "wrap the model with their rank and alpha"
            )
