"""What the layers of one forward pass tell each other.

A mixer may need what an earlier layer made of the same tokens (RWKV-7 mixes every layer's values with those of the first).  The carrier
is made anew for every call of the backbone and travels to the layers as the keyword ``across_layers``, as the documents do: nothing is
kept in modules, nothing in the cache, and it does not matter which layers are kept as softmax attention.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class AcrossLayers:
    """Named tensors, each of the first layer that gave one.  Not a dictionary itself: wrappers of layers copy Python's containers."""

    def __init__(self) -> None:
        self._given: dict[str, Tensor] = {}

    def first(self, name: str, value: Tensor) -> Tensor:
        """What the first caller gave under ``name``: ``value`` itself (any shape) for that caller.

        A layer that is computed again in the backward pass finds what it gave in the forward pass.
        """
        return self._given.setdefault(name, value)


def carry_across(network: nn.Module) -> None:
    """Hand every call of ``network`` a carrier of its own, unless the caller brings one."""
    network.register_forward_pre_hook(_bring, with_kwargs=True)


def _bring(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {"across_layers": AcrossLayers(), **kwargs}
