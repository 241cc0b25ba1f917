"""What ``adapter_config.json`` says about an adapter, and which adapters are more than a LoRA on Linears.

The fields are those of ``peft.LoraConfig``; peft itself is not needed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.adapters.spec import AdapterSpec
from limbeck.errors import AdapterError

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
    "target_parameters": "it changes bare parameters (such as fused experts), not Linears: choose target_modules",
    "trainable_token_indices": "it brings trained embeddings with it: train it without",
}
"""Fields that, when set, make an adapter more than ``scale * B A`` on Linears."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that also change the base weights."""


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
        return self._pattern("rank_pattern", path, self.fields["r"])

    def alpha(self, path: str) -> float:
        """Of the Linear at ``path``."""
        return self._pattern("alpha_pattern", path, self.fields.get("lora_alpha", 8))

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
        if not words:
            raise AdapterError(f"{self.folder / CONFIG}: target_modules is {words!r}, so it cannot be checked what the adapter should change")
        modules = dict(model.named_modules())
        if isinstance(words, str) and words.lower() == "all-linear":
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            chosen = [path for path, module in modules.items() if isinstance(module, nn.Linear) and module is not head]
        else:
            chosen = [path for path in modules if _named(words, path) and (isinstance(words, str) or self._in_layers(path))]
        excluded = self.fields.get("exclude_modules")
        return [path for path in chosen if not excluded or not _named(excluded, path)]

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
        raise AdapterError(f"{folder} holds no {CONFIG}: it is no PEFT adapter" if folder.is_dir() else f"{folder}: no such folder")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path}: cannot be read ({error})") from error
    kind = fields.get("peft_type") if isinstance(fields, dict) else None
    if kind != "LORA":
        raise AdapterError(f"{path}: peft_type is {kind!r}, and only 'LORA' can be read")
    problems = [f"{field} is {fields[field]!r}: {why}" for field, why in _REFUSED.items() if fields.get(field)]
    if fields.get("bias", "none") != "none":
        problems.append(f"bias is {fields['bias']!r}: it trains the base's biases; train it with bias 'none', or {_MERGE}")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        problems.append(
            f"init_lora_weights is {start!r}, which also changed the base: save it for the untouched base with peft "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    ranks = [fields.get("r"), *(fields.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        problems.append(f"ranks are {ranks}, and must be whole numbers above 0")
    if problems:
        raise AdapterError(f"{path}: " + "; ".join(problems))
    return PeftConfig(folder, fields)


def config_fields(spec: AdapterSpec, base: str | None) -> dict[str, Any]:
    """The fields of ``adapter_config.json`` for a spec: every Linear by its full path, one rank and alpha for all."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "use_rslora": spec.rslora,
        "target_modules": spec.paths,
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _named(words: str | Iterable[str], path: str) -> bool:
    """By a pattern for the whole path, or by one of several endings."""
    if isinstance(words, str):
        return re.fullmatch(words, path) is not None
    return any(path == word or path.endswith(f".{word}") for word in words)
