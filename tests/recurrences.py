"""What the tests of chunked recurrences share: inputs, outputs with every gradient, and comparison relative to the largest entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
LENGTHS = (3, 13, 1, 16, 10, 7)
"""Documents that begin at a chunk's first token, at its second and in its middle, for chunks of 16."""


class Inputs:
    """Random fp64 tensors from one seed."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def unit(self, *shape: int) -> Tensor:
        """Unit length in the last dimension."""
        return F.normalize(self.normal(*shape), dim=-1)

    def uniform(self, *shape: int) -> Tensor:
        """In [0, 1]."""
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)


def results(rule: Callable[..., Any], inputs: Sequence[Tensor], dtype: torch.dtype, state: str = "initial_state_BHKV", **options: Any) -> list[Tensor]:
    """Output, final state and every gradient of a fixed random functional of both; the last input is the argument named ``state``."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    output, final = rule(*leaves[:-1], **{state: leaves[-1]}, **options)
    return [output, final, *gradients_of(output, final, leaves)]


def gradients_of(output: Tensor, state: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the functional that :func:`results` takes."""
    weights = Inputs(9)
    loss = (output.double() * weights.normal(*output.shape)).sum() + (state.double() * weights.normal(*state.shape)).sum()
    return list(torch.autograd.grad(loss, leaves))


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Largest difference relative to the largest entry, tensor by tensor: output, final state, gradients in the inputs' order."""
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.isfinite().all(), number
        error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-6)
        assert error <= tolerance, f"tensor {number}: {error:.2e}"


def separately(rule: Callable[..., Any], inputs: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """What :func:`results` gives for documents that are run one by one, the first from the initial state."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    state, outputs, start = leaves[-1], [], 0
    for length in lengths:
        output, final = rule(*(x[:, start : start + length] for x in leaves[:-1]), initial_state_BHKV=state)
        outputs.append(output)
        state, start = torch.zeros_like(leaves[-1]), start + length
    output = torch.cat(outputs, 1)
    return [output, final, *gradients_of(output, final, leaves)]


def numbered(lengths: Sequence[int]) -> Tensor:
    """``documents_BT`` of one row."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
