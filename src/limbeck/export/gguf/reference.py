"""The model in torch as llama.cpp computes it: the file's numbers as weights, and activations rounded before each product.

ggml rounds the other factor of a product to suit the weight's type: to Q8_K for TQ1_0 and TQ2_0, to Q8_0 for Q2_0 and Q8_0, to bf16 or
fp16 for those.  The rounding is the same here; sums are taken in another order, so that now and then one falls to the other side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from limbeck.errors import ModelError
from limbeck.export.gguf.packing import BF16, F16, F32, Q2_0, Q8_0, TQ1_0, TQ2_0, FileType, as_read
from limbeck.export.gguf.plan import Planned
from limbeck.export.gguf.weights import Weights
from limbeck.models.experts import pin_experts
from limbeck.ops.ternary import round_q8_K

Rounding = Callable[[Tensor], Tensor]


def round_q8_0(x: Tensor) -> Tensor:
    """Activations ``x [*, I]`` as ggml's Q8_0, in fp32: blocks of 32, ``q = round(x 127 / max |x|)`` (halves away from zero), an
    fp16 scale."""
    if x.shape[-1] % Q8_0.block:
        raise ModelError(f"Q8_0 rounds blocks of {Q8_0.block} activations, and {x.shape[-1]} is no multiple")
    blocks = x.float().unflatten(-1, (-1, Q8_0.block))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    ratio = torch.where(scale > 0, blocks * (1 / scale), 0.0)
    codes = torch.trunc(ratio + torch.copysign(torch.full_like(ratio, 0.5), ratio))
    return (codes * scale.half().float()).flatten(-2)


ROUNDINGS: dict[FileType, Rounding] = {
    BF16: lambda x: x.bfloat16().float(),
    F16: lambda x: x.half().float(),
    Q8_0: round_q8_0,
    Q2_0: round_q8_0,
    TQ1_0: round_q8_K,
    TQ2_0: round_q8_K,
}
"""What a type's products do to activations; nothing for fp32."""


@torch.no_grad()
def reference_model(weights: Weights, plan: Sequence[Planned], *, emulate: bool = True) -> PreTrainedModel:
    """The family's fp32 model with the numbers of a file that was written by ``plan``; ``emulate`` rounds activations as ggml does."""
    types = {one.piece.source: one.type for one in plan}
    config = weights.config
    with torch.device("meta"):
        pin_experts(config)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Rotary tables are no parameters: they are computed, not read.
    model.to_empty(device="cpu")
    state = {name: as_read(weights.read(name), types[name]) for name in weights.shapes}
    unknown = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    if unknown:
        raise ModelError(f"the family's model has no place for {', '.join(unknown[:4])}")
    model.tie_weights()
    _fill_buffers(model)
    lost = [name for name, _ in model.named_parameters() if name not in state and name not in model.all_tied_weights_keys]
    if lost:
        raise ModelError(f"the file's plan has no numbers for {', '.join(lost[:4])}")
    model.eval()
    if emulate:
        _emulate(model, types)
    return model


def _fill_buffers(model: PreTrainedModel) -> None:
    """Non-persistent buffers as the modules that own them compute them."""
    for module in model.modules():
        if module._non_persistent_buffers_set:
            fresh = type(module)(model.config)
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer)


def _emulate(model: PreTrainedModel, types: dict[str, FileType]) -> None:
    tied = model.all_tied_weights_keys
    for name, module in model.named_modules():
        kind = types.get(f"{name}.weight") or types.get(tied.get(f"{name}.weight", ""))
        if isinstance(module, nn.Linear) and kind in ROUNDINGS:
            module.register_forward_pre_hook(_first_rounded(ROUNDINGS[kind]))
        into, out = types.get(f"{name}.gate_up_proj"), types.get(f"{name}.down_proj")
        if into in ROUNDINGS:
            module.register_forward_pre_hook(_first_rounded(ROUNDINGS[into]))
        if out in ROUNDINGS and hasattr(module, "_apply_gate"):
            vars(module)["_apply_gate"] = _rounded_after(module._apply_gate, ROUNDINGS[out])


def _first_rounded(rounding: Rounding) -> Any:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return rounding(arguments[0]), *arguments[1:]

    return hook


def _rounded_after(function: Any, rounding: Rounding) -> Any:
    return lambda hidden: rounding(function(hidden))


def exact(plan: Sequence[Planned]) -> bool:
    """Whether the file's products round nothing."""
    return all(one.type is F32 for one in plan)
