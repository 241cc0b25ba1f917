"""Training in which attention layers are skipped at random, so that no single layer is the only one that can do a thing.

Stochastic depth (Huang et al. 2016, arXiv 1603.09382) on the attention sub-layers alone: every row skips layer ``l`` of ``L``
with probability ``p * l / (L - 1)``.  Nothing is rescaled, and nothing is skipped in evaluation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.models.structure import attention_slot, decoder_layers


def skip_attention(model: nn.Module, probability: float) -> None:
    """Skip attention in training with ``probability`` in the last layer, falling linearly to none in the first."""
    layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        attention = getattr(layer, attention_slot(layer))
        # Compiled layers share code and are not told apart by their hooks: every layer has the same hook, the first one too,
        # and its own probability as a tensor, which is an input of that code.
        share = torch.tensor(probability * index / max(1, len(layers) - 1), device=next(attention.parameters()).device)
        attention.register_buffer("skip_probability", share, persistent=False)
        attention.register_forward_hook(_skip)


def _skip(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if not module.training:
        return output
    mixed_BTD: Tensor = output[0] if isinstance(output, tuple) else output
    kept_B11 = torch.rand(mixed_BTD.shape[0], 1, 1, device=mixed_BTD.device) >= module.skip_probability
    mixed_BTD = mixed_BTD * kept_B11.to(mixed_BTD.dtype)
    return (mixed_BTD, *output[1:]) if isinstance(output, tuple) else mixed_BTD
