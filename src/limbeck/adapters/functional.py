"""The reference for injection: a PEFT-wrapped model called with other LoRA weights, one adapter at a time, gradients and all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from limbeck.adapters.spec import Adapters
from limbeck.errors import AdapterError


class FunctionalLoRA:
    """Calls a model that ``peft.get_peft_model`` wrapped as if its LoRA were another, without changing it.

    Slower than :class:`limbeck.adapters.inject.Injector`, which is checked against it.
    """

    def __init__(self, peft_model: nn.Module, adapter_name: str = "default"):
        self.model = peft_model
        self.adapter_name = adapter_name
        self._known = {name for name, _ in peft_model.named_parameters() if f".{adapter_name}." in name and "lora_" in name}

    def apply_lora_weights(self, adapters: Adapters, index: int = 0) -> dict[str, Tensor]:
        """The parameters that stand in for the model's own: its LoRA, with the gradient of ``adapters``; one adapter of them.

        Raises:
            AdapterError: a LoRA tensor of the model is not covered, or one that it does not have.
        """
        parameters: dict[str, Tensor] = {}
        for site in adapters.spec.sites:
            for row, path in enumerate(site.paths()):
                for letter, factors in (("A", adapters.A), ("B", adapters.B)):
                    parameters[f"base_model.model.{path}.lora_{letter}.{self.adapter_name}.weight"] = factors[site.name][index, row]
        odd = sorted(self._known ^ set(parameters))
        if odd:
            raise AdapterError(f"{odd[0]} is in only one of the model's LoRA and the adapter ({len(odd)} such tensors of {len(parameters)})")
        return parameters

    def __call__(self, adapters: Adapters, index: int = 0, **inputs: Any) -> Any:
        """The model's output with adapter ``index``."""
        weights: Mapping[str, Tensor] = self.apply_lora_weights(adapters, index)
        return functional_call(self.model, dict(weights), (), inputs)
