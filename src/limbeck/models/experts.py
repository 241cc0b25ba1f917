"""Routed experts as one grouped product, in the dtype that the step computes in.

transformers' own grouped form takes no part in autocast (experts would stay in fp32 while everything around them is in bf16), and
knows neither fp64 nor widths that are no multiple of 16 bytes.  This one is registered beside it, and every model that Limbeck loads
or builds uses it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm
from transformers import PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

EXPERTS = "limbeck_grouped"
"""Its name among transformers' experts implementations."""
_GROUPED = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNED = 16
"""Bytes that the rows of a grouped product's factors are multiples of."""


def pin_experts(config: PreTrainedConfig) -> None:
    """Take the experts implementation that was saved with the config, else ours, unless the caller chose one."""
    if config._experts_implementation is None:
        config._experts_implementation = getattr(config, "limbeck_experts", EXPERTS)


def routed_experts(experts: Any, x_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """``sum_k weights[t, k] * expert[chosen[t, k]](x[t])`` over the K experts of a token, ``[T, D]`` in the dtype of ``x``.

    ``experts`` is a module of transformers with ``gate_up_proj [E, 2 F, D]`` and ``down_proj [E, D, F]``; for other layouts
    (biases, transposed weights, no gate, experts spread over ranks) transformers' own grouped form is used.  A module that computes
    with other weights than it holds has ``quantised(name)``, and ``rounded(name, x)`` for what they are multiplied with.
    """
    if not plain(experts):
        return grouped_mm_experts_forward(experts, x_TD, chosen_TK, weights_TK)
    count = chosen_TK.shape[1]
    chosen_S, order_S = chosen_TK.flatten().sort(stable=True)
    numbers = torch.arange(experts.num_experts, device=chosen_S.device)
    # Not a count of the tokens of each: counting integers waits for the device.
    ends_E = torch.searchsorted(chosen_S, numbers, right=True, out_int32=True)
    dtype = _compute_dtype(x_TD, experts.gate_up_proj)
    # Rounded once a token, before it goes to several experts.
    x = _rounded(experts, "gate_up_proj", x_TD.to(dtype)).index_select(0, order_S // count)
    hidden = experts._apply_gate(grouped_product(x, _weight(experts, "gate_up_proj").to(dtype), ends_E))
    y = grouped_product(_rounded(experts, "down_proj", hidden), _weight(experts, "down_proj").to(dtype), ends_E)
    y_TKD = torch.empty_like(y).index_copy(0, order_S, y).unflatten(0, (-1, count))
    return (y_TKD * weights_TK.unsqueeze(-1)).sum(1, dtype=x_TD.dtype)


def grouped_product(x_SI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """``x[s] @ weight[e].T`` for S rows sorted by expert, ``[S, O]``; rows of expert e end before ``ends_E[e]`` (int32)."""
    sizes = (x_SI.shape[1], weight_EOI.shape[1])
    if x_SI.dtype in _GROUPED and not any(size * x_SI.element_size() % _ALIGNED for size in sizes):
        return grouped_mm(x_SI, weight_EOI.mT, offs=ends_E)
    rows = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    return torch.cat([part @ weight.T for part, weight in zip(x_SI.split(rows), weight_EOI.unbind(), strict=True)])


def plain(experts: Any) -> bool:
    """Whether experts have the layout that is computed here."""
    odd = experts.has_bias or experts.is_transposed or experts.has_post_expert_norm or experts._is_expert_parallel
    return experts.has_gate and not odd


def _weight(experts: Any, name: str) -> Tensor:
    return experts.quantised(name) if hasattr(experts, "quantised") else getattr(experts, name)


def _rounded(experts: Any, name: str, x: Tensor) -> Tensor:
    return experts.rounded(name, x) if hasattr(experts, "rounded") else x


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What a Linear would compute in: autocast's dtype where it is on, except that it leaves fp64 alone."""
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, routed_experts)
