"""Heads, hidden states and labels for the fused operators, and the naive computation that they are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from limbeck.types import IGNORE, Head

N, D, V = 37, 12, 50


def dense_logits(hidden: Tensor, head: Head) -> Tensor:
    logits = hidden @ head.weight_VD.T
    if head.bias_V is not None:
        logits = logits + head.bias_V
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    if head.vocab_mask_V is not None:
        logits = logits.masked_fill(~head.vocab_mask_V, -torch.inf)
    return logits


def dense_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Over logits of one width, ``-inf`` where an id does not exist: summed there by hand."""
    log_s, log_t = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    terms = log_t.exp() * (log_t - log_s)
    return temperature**2 * terms.where(teacher > -torch.inf, 0).sum()


def make_case(dtype: torch.dtype, kind: str = "plain", seed: int = 0, tokens: int = N) -> tuple[Tensor, Head, Tensor, Tensor]:
    """Hidden states, head, labels (a third ignored) and their mask."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight, bias = normal(tokens, D), normal(V, D), normal(V)
    labels = torch.randint(0, V - 8, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.33] = IGNORE
    mask = torch.ones(V, dtype=torch.bool)
    if kind == "plain":
        head = Head(weight)
    elif kind == "all":
        mask[-5:] = False
        head = Head(weight, bias, 3.0, 0.7, mask)
    else:
        mask[[0, 7, V - 1]] = False
        labels[labels == 0] = 1
        labels[labels == 7] = 8
        head = Head(weight, bias, vocab_mask_V=mask)
    return hidden, head, labels, labels != IGNORE


def gradients(loss: Tensor, hidden: Tensor, head: Head) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x for x in (hidden, head.weight_VD, head.bias_V) if x is not None]))


def requiring_grad(hidden: Tensor, head: Head) -> None:
    for x in (hidden, head.weight_VD, head.bias_V):
        if x is not None:
            x.requires_grad_()


def assert_relative(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


class Work(TorchDispatchMode):
    """The largest result of any operation, and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        self.products += "mm" in func.__name__
        return out
