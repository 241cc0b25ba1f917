"""What the tests of chunked operators share: the definitions they are compared to, inputs, outputs with every gradient, and comparison
relative to the largest entry."""

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


def by_steps(step: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The recurrence over whole rows, token by token and in the inputs' own dtype, of a rule's decode step.

    The state is zero again where a document begins that is not the row's first; padding reads zero and leaves it as it was.
    """

    def rule(*inputs_BT: Tensor, documents_BT: Tensor | None = None, **named: Tensor) -> tuple[Tensor, Tensor]:
        (state,) = named.values()
        batch, num_tokens = inputs_BT[0].shape[:2]
        before = [-1] * batch
        outputs = []
        for t in range(num_tokens):
            real = [True] * batch
            if documents_BT is not None:
                now = documents_BT[:, t].tolist()
                real = [i >= 0 for i in now]
                begins = [i >= 0 and last >= 0 and i != last for i, last in zip(now, before, strict=True)]
                before = [i if i >= 0 else last for i, last in zip(now, before, strict=True)]
                state = torch.where(torch.tensor(begins)[:, None, None, None], 0, state)
            real_B111 = torch.tensor(real)[:, None, None, None]
            output, written = step(*(x[:, t] for x in inputs_BT), state)
            state = torch.where(real_B111, written, state)
            outputs.append(torch.where(real_B111[..., 0], output, 0))
        return torch.stack(outputs, 1), state

    return rule


def keys_moved_token_by_token(
    q_BTJGK: Tensor, w_BTJK: Tensor, beta_BTJ: Tensor, k_BTJK: Tensor, v_BTJV: Tensor, document_BT: Tensor, *, scale: float
) -> Tensor:
    """The definition of :func:`limbeck.ops.path_attention.path_attention`: at every token every key before it is moved."""
    keys = k_BTJK[:, :0]
    outputs = []
    for t in range(q_BTJGK.shape[1]):
        w, beta = w_BTJK[:, t, None], beta_BTJ[:, t, None, :, None]
        keys = torch.cat([keys - beta * w * (keys * w).sum(-1, keepdim=True), k_BTJK[:, t, None]], 1)
        scores = torch.einsum("bjgk,bsjk->bjgs", q_BTJGK[:, t], keys) * scale
        seen = (document_BT[:, : t + 1] == document_BT[:, t, None])[:, None, None]
        outputs.append(torch.einsum("bjgs,bsjv->bjgv", scores.masked_fill(~seen, -torch.inf).softmax(-1), v_BTJV[:, : t + 1]))
    return torch.stack(outputs, 1)
