"""Linears that peft mistakes for routed experts."""

from __future__ import annotations

from torch import nn

from limbeck.adapters.spec import AdapterSpec

FUSED = (".experts.gate_up_proj", ".experts.down_proj")
"""How parameters end that hold all experts of a layer."""
_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate")
"""What the parts of an expert and the router were called when each expert had Linears of its own."""


def taken_for_experts(model: nn.Module, spec: AdapterSpec) -> list[str]:
    """The Linears of a spec that must be named by their weight for peft to find them; most models have none.

    Where a model keeps its experts in one parameter, peft (0.21) takes every target with the name of an expert's part to mean the routed
    experts (``peft.utils.transformers_weight_conversion``): the shared expert's too, and those of a dense layer.  It then changes the
    wrong weights, and warns of missing keys at most.  A target that is a parameter it leaves as it is.
    """
    if not any(name.endswith(FUSED) for name, _ in model.named_parameters()):
        return []
    return [path for path in spec.paths if path.rpartition(".")[2] in _OF_EXPERTS]
