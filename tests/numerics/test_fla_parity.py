"""flash-linear-attention's kernels against the torch form in fp64, on the GPU: needs CUDA, triton and the package, and says what it lacks.

Tolerances are relative (Frobenius norm): bf16 1e-2 in outputs and states and 3e-2 in gradients, fp32 (TF32 products) 2e-3 and 1e-2.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.ops import backends, fla_kernels
from limbeck.ops.delta_rule import gated_delta_rule
from limbeck.ops.gated_slots import gated_slot_attention
from limbeck.ops.kda import kimi_delta_rule
from limbeck.ops.linear_attention import linear_attention
from limbeck.ops.rwkv7 import generalised_delta_rule


def _lacking() -> str | None:
    return backends.missing() if torch.cuda.is_available() else "there is no CUDA device"


pytestmark = pytest.mark.skipif(_lacking() is not None, reason=f"flash-linear-attention's kernels cannot run here: {_lacking()}")
DEVICE = "cuda"
TOLERANCES = {torch.bfloat16: (1e-2, 3e-2), torch.float32: (2e-3, 1e-2)}
OPERATORS: dict[str, tuple[Any, int]] = {
    "gated delta": (gated_delta_rule, 0),
    "kimi": (kimi_delta_rule, 1),
    "head decay": (linear_attention, 0),
    "channel decay": (linear_attention, 1),
    "slots": (gated_slot_attention, 1),
    "generalised": (generalised_delta_rule, 3),
}
LENGTHS = ([-1] * 7 + [0] * 300 + [1] + [2] * 64 + [-1] * 3 + [3] * 225, [0] * 600, [-1] * 600)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_kernel_equals_the_torch_form(operator: str, packed: bool, width: int, dtype: torch.dtype) -> None:
    function, channels = OPERATORS[operator]
    made = fla_kernels.example(function.__name__, (width,) * (3 + channels), batch=3, tokens=600, heads=4)
    # The reference starts from the rounded inputs.
    inputs = [x.to(DEVICE, dtype if i < 3 else torch.float32) for i, x in enumerate(made)]
    documents_BT = torch.tensor(LENGTHS, device=DEVICE) if packed else None
    with backends.use("torch"):
        expected = _computed(function, [x.double() for x in inputs], documents_BT)
    with backends.use("fla"):
        found = _computed(function, inputs, documents_BT)
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        error = float((a.double() - b).norm() / b.norm())
        assert error <= TOLERANCES[dtype][number > 1], f"tensor {number}: {error:.2g}"


def _computed(function: Any, inputs: list[Tensor], documents_BT: Tensor | None) -> list[Tensor]:
    """Output, final state, and the gradients of all inputs and of the initial state along fixed directions."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    word = "initial_state" if function is gated_slot_attention else "initial_state_BHKV"
    output, final = function(*leaves[:-1], documents_BT=documents_BT, **{word: leaves[-1]})
    generator = torch.Generator().manual_seed(9)
    directions = [torch.randn(*x.shape, generator=generator).bfloat16().to(x) for x in (output, final)]
    return [x.detach() for x in (output, final, *torch.autograd.grad([output, final], leaves, directions))]
