"""What the doors take: a model or its folder, adapters or their PEFT folders, texts or probes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.adapters.deltas import Probes
from limbeck.adapters.inject import Injector
from limbeck.adapters.output import RunBase
from limbeck.adapters.peft_files import read_peft
from limbeck.adapters.spec import Adapters, AdapterSpec, cat
from limbeck.config.parts.adapters import ProbeOptions
from limbeck.errors import DataError, ModelError, RunError
from limbeck.models.loading import load_model, load_tokenizer, resolve_source
from limbeck.stages.folder import read_object
from limbeck.stages.probing import probes_of
from limbeck.students.adapted import runner

AdapterSource = Adapters | str | Path | Sequence[str | Path]
"""Adapters, a PEFT folder, or several of one shape."""
ProbeSource = Probes | Sequence[str]
"""Tokens, or texts that a tokenizer makes them of."""


def open_base(model: Any) -> Any:
    """A model from its folder, hub name or ``builtin:NAME``, frozen; a model object as it is, if it is in evaluation mode."""
    if isinstance(model, str | Path):
        return load_model(resolve_source(str(model))).requires_grad_(False)
    if not isinstance(model, nn.Module):
        raise ModelError(f"a base model is a transformers model or its folder, and this is a {type(model).__name__}")
    if model.training:
        raise ModelError("the base is in training mode, in which what it says may be random: call its .eval() first")
    return model


def open_probes(probes: ProbeSource, tokenizer: Any, *, length: int = 256) -> Probes:
    """Right-padded tokens of texts, at most ``length`` each; ``tokenizer`` is one or its folder."""
    if isinstance(probes, Probes):
        return probes
    if isinstance(probes, str):
        raise DataError("probes are a list of texts, and this is one text: put it into a list")
    if tokenizer is None:
        raise DataError("probes given as texts need the base's tokenizer: give `tokenizer`, or probes that are tokens already")
    words = load_tokenizer(resolve_source(str(tokenizer))) if isinstance(tokenizer, str | Path) else tokenizer
    if not probes:
        raise DataError("probes: there are none: give texts")
    return probes_of(ProbeOptions(kind="texts", texts=tuple(probes), length=length), words)


def open_adapters(adapters: AdapterSource, model: nn.Module) -> Adapters:
    """The adapters of PEFT folders, each checked against the model."""
    if isinstance(adapters, Adapters):
        return adapters
    return cat(read_peft(Path(folder), model) for folder in adapter_names(adapters))


def adapter_names(adapters: AdapterSource) -> list[str]:
    """The folders; none of adapters that lie in memory."""
    if isinstance(adapters, Adapters):
        return []
    folders = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    if not folders:
        raise DataError("adapters: no folder is named")
    return [str(folder) for folder in folders]


@contextmanager
def injected(model: Any, spec: AdapterSpec) -> Iterator[RunBase]:
    """A way to run the base with adapters; the hooks are gone afterwards (a backward pass that recomputes needs them still)."""
    injector = Injector(model, spec)
    try:
        yield runner(model, injector)
    finally:
        injector.remove()


def stage_of_kind(run: str | Path, kind: str, name: str | None = None) -> str:
    """The stage of a kind in a run directory: the named one, or the only one there is."""
    path = Path(run) / "recipe.json"
    if not path.is_file():
        raise RunError(f"{run}: is no run directory (no recipe.json): name what `limbeck run` or `train` made, such as runs/NAME")
    kinds = {stage: options["kind"] for stage, options in read_object(path, stages=dict)["stages"].items()}
    found = [stage for stage, its in kinds.items() if its == kind]
    if name is not None and name not in found:
        raise RunError(f"{run}: no {kind} stage named {name!r}; there {'are ' + ', '.join(found) if found else 'is none'}")
    if name is None and len(found) != 1:
        raise RunError(f"{run}: {'several' if found else 'no'} {kind} stages{' (' + ', '.join(found) + '): name one' if found else ': add one to its recipe'}")
    return name or found[0]
