"""A model folder as what goes into a file: plain models as they are, ternary students as codes, hybrids as the Qwen3.5 they equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from limbeck.config.parts.precision import plan_for, precision_of
from limbeck.config.parts.surgeries import TernarizeOptions
from limbeck.errors import ModelError
from limbeck.export.foreign import check_foreign
from limbeck.export.gguf.architectures import architecture
from limbeck.export.gguf.packing import Weight
from limbeck.export.gguf.weights import FolderWeights, ModelWeights, Weights
from limbeck.export.native import native_model
from limbeck.models.limbeck_config import MODEL_TYPE
from limbeck.models.loading import check_folder, load_config, load_model
from limbeck.ops.ternary import Granularity, dequantised, ternary
from limbeck.students.ternarize import FUSED, check_exportable, ternarize_options
from limbeck.students.ternary.modules import Quantised


@dataclass(frozen=True)
class Origin:
    """A model to be written."""

    weights: Weights
    group: Callable[[str, int], int | None]
    """Inputs to a scale of a ternary tensor with so many inputs, None for one that is not ternary."""
    kept: Callable[[str], str]
    """The plan's precision of the others."""
    about: dict[str, Any]
    """What the manifest says of it."""


def opened(folder: Path) -> Origin:
    """A folder as it was trained; a ternary student whose warm-up is not over, or one that no file can hold, is a :class:`ModelError`."""
    check_folder(str(folder))
    config = load_config(str(folder))
    if getattr(config, "model_type", None) != MODEL_TYPE:
        architecture(config)
        return Origin(FolderWeights(folder, config), _none, _keep, {"trained_ternary": False})
    check_foreign(config, "gguf")
    options = ternarize_options(config)
    if options is not None:
        check_exportable(config)
    kinds = {part["kind"] for part in config.limbeck["surgery"]}
    if kinds <= {"ternarize"}:
        return _ternary_folder(folder, config, options)
    return _hybrid(folder, options)


def _none(name: str, width: int) -> int | None:
    return None


def _keep(name: str) -> str:
    return "keep"


def _about(options: TernarizeOptions | None) -> dict[str, Any]:
    if options is None:
        return {"trained_ternary": False}
    plan = options.plan if isinstance(options.plan, str) else [rule.model_dump() for rule in options.plan]
    return {"trained_ternary": True, "plan": plan, "scale": options.scale, "group": options.group, "method": options.method}


def _ternary_folder(folder: Path, config: Any, options: TernarizeOptions | None) -> Origin:
    """Read tensor by tensor; a student without weights says how each becomes codes."""
    with torch.device("meta"):
        student: Any = AutoModelForCausalLM.from_config(config)
    modules = {f"{path}.{name}": module for path, module in student.named_modules() if isinstance(module, Quantised) for name in module.parts}
    scales = {f"{path}_scale" for path, module in modules.items() if module.quantiser.method == "elastic"}
    base = _base_config(config)
    architecture(base)
    weights = FolderWeights(folder, base, extra=scales)

    def codes(name: str, weight: Tensor) -> Weight:
        if name not in modules:
            return weight
        learnt = weights.stored(f"{name}_scale") if f"{name}_scale" in scales else None
        return modules[name].codes(name.rpartition(".")[2], weight, learnt)

    weights.ternarise = codes

    def group(name: str, width: int) -> int | None:
        return None if name not in modules else modules[name].quantiser.group or width

    plan = options.plan if options is not None else ()
    return Origin(weights, group, lambda name: precision_of(plan, name), _about(options))


def _base_config(config: Any) -> Any:
    """The config of the family that a student is one of, without what Limbeck added."""
    fields = {name: value for name, value in config.to_dict().items() if not name.startswith("limbeck")}
    return CONFIG_MAPPING[config.limbeck["base"]["model_type"]].from_dict({**fields, "model_type": config.limbeck["base"]["model_type"]})


def _hybrid(folder: Path, options: TernarizeOptions | None) -> Origin:
    """A hybrid as a Qwen3.5, whole in memory; its ternary weights are found again by their values, which moved but did not change."""
    model = load_model(str(folder))
    _settle(model)
    native = native_model(model, "export to GGUF, where a hybrid is written as Qwen3.5")
    if options is None:
        return Origin(ModelWeights(native), _none, _keep, _about(None))
    scale: Granularity = "group" if options.group else "row"
    matrices = {name: weight for name, weight in native.state_dict().items() if ".layers." in name and weight.ndim == 2}
    exact = {name for name, weight in matrices.items() if _is_exact(weight, scale, options.group)}

    def codes(name: str, weight: Tensor) -> Weight:
        return ternary(weight, scale=scale, group=options.group, method="exact") if name in exact else weight

    return Origin(ModelWeights(native, codes), lambda name, width: options.group or width if name in exact else None, _keep, _about(options))


@torch.no_grad()
def _settle(model: PreTrainedModel) -> None:
    """Codes times scales in the place of the weights, and learnt scales gone: plain tensors under plain names."""
    for module in model.modules():
        if isinstance(module, Quantised):
            for name in module.parts:
                setattr(module, name, nn.Parameter(dequantised(module.codes(name)), requires_grad=False))
                module._parameters.pop(f"{name}_scale", None)


def _is_exact(weight: Tensor, scale: Granularity, group: int | None) -> bool:
    if group is not None and weight.shape[-1] % group:
        return False
    return torch.equal(dequantised(ternary(weight, scale=scale, group=group, method="exact")), weight.float())


def forced(origin: Origin, scale: Granularity, group: int | None) -> Origin:
    """A model that was not trained ternary, rounded as it is: the plan is that of its kind, the scales are of least squared error."""
    weights = origin.weights
    plan = plan_for(weights.shapes)
    chosen = {name for name in weights.shapes if precision_of(plan, name) == "ternary"}
    if not chosen:
        raise ModelError("no weight of this model is a projection or an expert that could be ternary: export it with --type bf16")
    torn = next((name for name in sorted(chosen) if group is not None and weights.shapes[name][-1] % group), None)
    if torn is not None:
        raise ModelError(f"--group-size {group}: the {weights.shapes[torn][-1]} inputs of {torn} are no multiple of it: give a divisor of them")

    def codes(name: str, weight: Tensor) -> Weight:
        if name not in chosen:
            return weight
        return ternary(weight.float(), scale=scale, group=group, method="mse", parts=2 if name.endswith(FUSED) else 1)

    about = {"trained_ternary": False, "forced": True, "plan": plan, "scale": scale, "group": group, "method": "mse"}
    return Origin(_Rounded(weights, codes), lambda name, width: (group or width) if name in chosen else None, _keep, about)


class _Rounded:
    """Weights that something is done to as they are read."""

    def __init__(self, weights: Weights, ternarise: Callable[[str, Tensor], Weight]):
        self.config, self.shapes = weights.config, weights.shapes
        self._weights, self._ternarise = weights, ternarise

    def read(self, name: str) -> Weight:
        """One tensor, or its codes and scales."""
        weight = self._weights.read(name)
        return self._ternarise(name, weight) if isinstance(weight, Tensor) else weight
