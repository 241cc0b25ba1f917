"""What ``adapter_config.json`` says about an adapter, and which adapters are more than a LoRA on Linears.

The fields are those of ``peft.LoraConfig``; peft itself is not needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.adapters.spec import AdapterSpec
from limbeck.errors import AdapterError
from limbeck.records import parse

CONFIG = "adapter_config.json"
_MERGE = "merge it into its base with peft (merge_and_unload) and use the result as a model"
_REFUSED = {
    "use_dora": f"DoRA rescales the rows of the whole weight: {_MERGE}",
    "modules_to_save": "it brings whole trained modules with it: train it without, or " + _MERGE,
    "lora_bias": "its B has a bias: train it with lora_bias off, or " + _MERGE,
    "use_qalora": f"QA-LoRA pools the inputs: {_MERGE}",
    "use_bdlora": "its factors are block-diagonal for sharding: save it in plain form",
    "kasa_config": f"KaSA also changes the base weights: {_MERGE}",
    "monteclora_config": "its factors are random variables: save their means as a plain LoRA",
    "arrow_config": "it is a router over other adapters: name those instead",
    "alora_invocation_tokens": "it acts only after certain tokens: train a plain LoRA",
    "layer_replication": "it repeats layers of the base: build that base as a model, and train a plain LoRA on it",
    "trainable_token_indices": "it brings trained embeddings with it: train it without",
}
"""Fields that, when set, make an adapter more than ``scale * B A`` on Linears."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that also change the base weights."""
_WEIGHT = ".weight"
_DEFAULT = 8
"""peft's rank and alpha where a file names none."""
_NUMBERS: dict[str, tuple[str, str, Callable[[Any], bool], str]] = {
    "r": ("rank_pattern", "ranks", lambda n: isinstance(n, int) and n > 0, "whole numbers above 0"),
    "lora_alpha": ("alpha_pattern", "alphas", lambda n: isinstance(n, int | float) and 0 < n < math.inf, "numbers above 0"),
}
"""Field -> its exceptions by Linear, what they are together, and what each may be."""


@dataclass(frozen=True)
class PeftConfig:
    """A checked ``adapter_config.json``."""

    folder: Path
    fields: Mapping[str, Any]

    @property
    def base(self) -> str | None:
        """The base model that the file names."""
        return self.fields.get("base_model_name_or_path")

    def rank(self, path: str) -> int:
        """Of the Linear at ``path``."""
        return self._pattern("rank_pattern", path, self.fields.get("r", _DEFAULT))

    def alpha(self, path: str) -> float:
        """Of the Linear at ``path``."""
        return self._pattern("alpha_pattern", path, self.fields.get("lora_alpha", _DEFAULT))

    @property
    def as_parameters(self) -> tuple[str, ...]:
        """Linears that the file names by their weight, as a parameter."""
        return tuple(name.removesuffix(_WEIGHT) for name in self.fields.get("target_parameters") or ())

    @property
    def rslora(self) -> bool:
        """Whether alpha is divided by the root of the rank."""
        return bool(self.fields.get("use_rslora"))

    def scale(self, path: str) -> float:
        """Factor on ``B A`` of the Linear at ``path``, by its own rank and alpha."""
        rank = self.rank(path)
        return self.alpha(path) / (math.sqrt(rank) if self.rslora else rank)

    def targets(self, model: nn.Module) -> list[str]:
        """The modules of a model that peft would put a LoRA on."""
        words = self.fields.get("target_modules")
        if not words and not self.as_parameters:
            raise AdapterError(f"{self.folder / CONFIG}: target_modules is {words!r}, so what the adapter should change is unknown: name its Linears there")
        modules = dict(model.named_modules())
        named = [path for path in modules if _named(self.as_parameters, path)]
        if not words:
            return named
        if isinstance(words, str) and words.lower() == "all-linear":
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            chosen = [path for path, module in modules.items() if isinstance(module, nn.Linear) and module is not head]
        else:
            chosen = [path for path in modules if _named(words, path) and (isinstance(words, str) or self._in_layers(path))]
        excluded = self.fields.get("exclude_modules")
        return [*(path for path in chosen if not excluded or not _named(excluded, path)), *named]

    def _pattern(self, field: str, path: str, default: Any) -> Any:
        patterns = self.fields.get(field) or {}
        return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", path)), default)

    def _in_layers(self, path: str) -> bool:
        wanted = self.fields.get("layers_to_transform")
        if wanted is None or wanted == []:
            return True
        names = self.fields.get("layers_pattern") or [r"[^.]*"]
        for name in [names] if isinstance(names, str) else names:
            match = re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", path)
            if match:
                return int(match[1]) in ([wanted] if isinstance(wanted, int) else wanted)
        return False


def read_config(folder: Path) -> PeftConfig:
    """Read and check a folder's ``adapter_config.json``; what is more than a LoRA on Linears is an :class:`AdapterError`."""
    path = folder / CONFIG
    if not path.is_file():
        if folder.is_dir():
            raise AdapterError(f"{folder} holds no {CONFIG}: it is no PEFT adapter: name another folder, or put the file back")
        raise AdapterError(f"{folder} is a file: name the folder of an adapter" if folder.exists() else f"{folder}: no such folder")
    try:
        fields = parse(path.read_bytes())
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: cannot be read ({error}): put an intact copy back") from error
    kind = fields.get("peft_type") if isinstance(fields, dict) else None
    if kind != "LORA":
        raise AdapterError(f"{path}: peft_type is {kind!r}, and only 'LORA' can be read: put an intact copy back, or name another adapter")
    problems = [f"{field} is {fields[field]!r}: {why}" for field, why in _REFUSED.items() if fields.get(field)]
    if fields.get("bias", "none") != "none":
        problems.append(f"bias is {fields['bias']!r}: it trains the base's biases; train it with bias 'none', or {_MERGE}")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        problems.append(
            f"init_lora_weights is {start!r}, which also changed the base: save it for the untouched base with peft "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    problems += [*_number_problems(fields), *_name_problems(fields)]
    if problems:
        raise AdapterError(f"{path}: " + "; ".join(problems))
    return PeftConfig(folder, fields)


def config_fields(spec: AdapterSpec, base: str | None, as_parameters: Collection[str] = ()) -> dict[str, Any]:
    """The fields of ``adapter_config.json`` for a spec: every Linear by its full path, one rank and alpha for all.

    The Linears in ``as_parameters`` are named by their weight.
    """
    parameters = [f"{path}{_WEIGHT}" for path in spec.paths if path in as_parameters]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "use_rslora": spec.rslora,
        "target_modules": [path for path in spec.paths if path not in as_parameters],
        # A field that older versions of peft do not know.
        **({"target_parameters": parameters} if parameters else {}),
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _number_problems(fields: Mapping[str, Any]) -> Iterator[str]:
    """Ranks and alphas that are none, and patterns for them that say nothing."""
    for field, (patterns, words, right, wanted) in _NUMBERS.items():
        exceptions = fields.get(patterns) or {}
        if not isinstance(exceptions, dict):
            yield f"{patterns} is {exceptions!r}, and must give a number for each name of a Linear"
            continue
        numbers = [fields.get(field, _DEFAULT), *exceptions.values()]
        if not all(right(number) for number in numbers):
            yield f"{words} are {numbers}, and must be {wanted}"
        yield from (problem for name in exceptions if (problem := _pattern_problem(patterns, name)))


def _name_problems(fields: Mapping[str, Any]) -> Iterator[str]:
    """Names of the base and of Linears that are none."""
    base = fields.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        yield f"base_model_name_or_path is {base!r}, and must be a name"
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        words = fields.get(field)
        if isinstance(words, str) and (problem := _pattern_problem(field, words)):
            yield problem
        elif not isinstance(words, str | list | None):
            yield f"{field} is {words!r}, and must be a pattern or a list of names"
    bare = [name for name in fields.get("target_parameters") or () if not str(name).endswith(_WEIGHT)]
    if bare:
        yield f"target_parameters names {bare[0]}: it changes bare parameters (such as fused experts), not Linears: choose target_modules"
    elif fields.get("target_parameters") and (fields.get("rank_pattern") or fields.get("alpha_pattern")):
        yield "target_parameters stands beside patterns of rank or alpha, which peft may match with either name: give one rank and alpha to all"


def _pattern_problem(field: str, pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{field} has {pattern!r}, which is no regular expression ({error})"
    return None


def _named(words: str | Iterable[str], path: str) -> bool:
    """By a pattern for the whole path, or by one of several endings."""
    if isinstance(words, str):
        return re.fullmatch(words, path) is not None
    return any(path == word or path.endswith(f".{word}") for word in words)
