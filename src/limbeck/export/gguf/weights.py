"""Where a file's numbers come from: a model in memory, or a folder that is read tensor by tensor and never held whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from limbeck.errors import ModelError, did_you_mean
from limbeck.export.gguf.packing import Weight
from limbeck.models.loading import weight_files

_IGNORED = re.compile(r"mtp\.|lm_head\.weight$|.*\.rotary_emb\.inv_freq$")
"""What a folder may have besides: drafting layers, a copy of a tied head, and the rotary frequencies that older files hold."""
Ternarise = Callable[[str, Tensor], Weight]
"""``(name, weight)`` as it is computed with: codes and scales where the model is ternary, the weight itself elsewhere."""


class Weights(Protocol):
    """Tensors by their names in transformers' module tree, tied ones once."""

    config: Any
    """Of the family that computes with them."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape by name."""
        ...

    def read(self, name: str) -> Weight:
        """One tensor, or its codes and scales."""
        ...


def as_it_is(name: str, weight: Tensor) -> Weight:
    """The ``Ternarise`` of a model without ternary weights: ``weight``, of any shape, itself."""
    return weight


def family_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a family's tensors, tied ones once; nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model_shapes(model)


def model_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, tied ones once."""
    tied = model.all_tied_weights_keys
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


class ModelWeights:
    """The tensors of a model in memory."""

    def __init__(self, model: PreTrainedModel, ternarise: Ternarise = as_it_is):
        self.config: Any = model.config
        self.shapes = model_shapes(model)
        self._state = model.state_dict()
        self._ternarise = ternarise

    def read(self, name: str) -> Weight:
        """One tensor, or its codes and scales."""
        return self._ternarise(name, self._state[name].detach().cpu())


class FolderWeights:
    """The tensors of a Hugging Face folder.  What it lacks, and what it has too much, is an error before anything is read.

    Experts that a folder holds one by one are given stacked, as transformers computes with them.  The last tensor is kept: gate and
    up are two readings of one.
    """

    def __init__(self, folder: Path, config: Any, ternarise: Ternarise = as_it_is, extra: Collection[str] = ()):
        self.config = config
        self.shapes = family_shapes(config)
        self.ternarise = ternarise
        self._folder = folder
        self._extra = extra
        self._last: tuple[str, Weight] | None = None
        self._check()

    @cached_property
    def _files(self) -> dict[str, Path]:
        """File by the name of a tensor on disk."""
        found: dict[str, Path] = {}
        for path in weight_files(self._folder):
            with _reading(path) as file:
                found |= dict.fromkeys(file.keys(), path)
        return found

    def read(self, name: str) -> Weight:
        """One tensor, or its codes and scales."""
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, self.ternarise(name, self._stacked(name)))
        return self._last[1]

    def stored(self, name: str) -> Tensor:
        """One of the ``extra`` tensors, which the folder has beside the family's: learnt scales."""
        return self._tensor(name)

    def _stacked(self, name: str) -> Tensor:
        parts = self._parts(name)
        if parts == [[name]]:
            found = self._tensor(name)
        else:
            found = torch.stack([torch.cat([self._tensor(part) for part in expert]) for expert in parts])
        if tuple(found.shape) != self.shapes[name]:
            raise ModelError(
                f"{self._folder}: {name} has shape {list(found.shape)} and its config says {list(self.shapes[name])}: download or save "
                "the folder again"
            )
        return found

    def _parts(self, name: str) -> list[list[str]]:
        """Names on disk of what a tensor is stacked from: for each expert its gate and up, or its down projection."""
        stacked = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
        if name in self._files or stacked is None:
            return [[name]]
        wanted = ("gate_proj", "up_proj") if stacked[2] == "gate_up_proj" else ("down_proj",)
        return [[f"{stacked[1]}.{expert}.{part}.weight" for part in wanted] for expert in range(self.shapes[name][0])]

    def _tensor(self, name: str) -> Tensor:
        with _reading(self._files[name]) as file:
            return file.get_tensor(name)

    def _check(self) -> None:
        wanted = {part for name in self.shapes for expert in self._parts(name) for part in expert} | set(self._extra)
        missing = sorted(wanted - set(self._files))
        if missing:
            raise ModelError(
                f"{self._folder}: lacks {len(missing)} tensors of a {self.config.model_type}, such as {missing[0]}"
                f"{did_you_mean(missing[0], self._files) or ''}: was the download or the save cut short?"
            )
        left = sorted(name for name in set(self._files) - wanted if not _IGNORED.match(name))
        if left:
            raise ModelError(
                f"{self._folder}: has {len(left)} tensors that a {self.config.model_type} does not, such as {left[0]}: is its "
                "config.json another model's?"
            )


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """An open file of tensors; one that is cut off, damaged or not there is a :class:`ModelError`."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read ({error}): was the download or the save cut short?") from error
