"""The contract of a mixer, and what several of them share.

A mixer sits in a decoder layer's attention slot and is called exactly as the family's attention was.  It must not keep tensors outside
its parameters and persistent buffers: a student is built on meta and filled from files, and anything else would come back as zeros.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from limbeck.config.base import Part
from limbeck.errors import ModelError
from limbeck.models.structure import AttentionFacts, AttentionView, Rotary

GroupedHeads = Literal["heads", "rows"]
"""How grouped key/value weights become one head a query head; ``rows`` is the scrambled control."""


@dataclass(frozen=True)
class Report:
    """Names of a mixer's tensors that were copied from attention, and of those that it starts by itself."""

    copied: list[str]
    fresh: list[str]


RATES = (1e-4, 0.45)
"""Forget rates a token that a measured distance may set: every mixer with a forget gate can have them."""


@dataclass(frozen=True)
class Measured:
    """What a few rows of text say of one layer's attention, fp64."""

    distance_H: Tensor
    """Mean distance in tokens that a head looks back."""

    @property
    def rates_H(self) -> Tensor:
        """Forget rates a token of memories that have half their weight within the distance (Taylor-Calibrate, arXiv 2606.16429)."""
        return (math.log(2) / self.distance_H.clamp_min(1e-12)).clamp(*RATES)


class Mixer(nn.Module, ABC):
    """Base class of mixers: built from options and the facts of the attention it replaces."""

    carries_across_layers: ClassVar[bool] = False
    """Whether ``forward`` takes ``across_layers``, what the layers of one forward pass tell each other (limbeck.models.across)."""

    def __init__(self, options: Part, facts: AttentionFacts, config: PreTrainedConfig, layer_index: int):
        super().__init__()
        self.options = options
        self.facts = facts
        self.layer_index = layer_index

    @abstractmethod
    def init_from(self, view: AttentionView, gqa: GroupedHeads = "heads") -> Report:
        """Fill *every* tensor of the mixer, from the attention where there is one that fits; the values then need no random numbers
        or come from torch's global generator."""

    @abstractmethod
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotary | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        documents_BT: Tensor | None = None,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """``hidden_states [B, T, D]`` to the same.

        ``position_embeddings`` are ``[B, T, W]`` each: the family's cos and sin; ``documents_BT`` numbers the documents of packed
        rows (-1 on padding); ``padding_mask`` ``[B, T]`` is True at real tokens of a padded batch.  ``attention_mask`` of any
        shape, made for softmax attention, is not read.  With a cache the call continues from, and updates, the layer's own state.
        """

    def calibrate(self, measured: Measured) -> list[str]:
        """Set what the attention's own weights tell, and return the names of the tensors that were set.  Setting it twice changes
        nothing."""
        return []

    @property
    def read_out(self) -> nn.Linear | None:
        """The output projection, if its input is heads side by side whose scale is the mixer's own and not the attention's."""
        return None

    @torch.no_grad()
    def scale_heads(self, gain_H: Tensor) -> list[str]:
        """Multiply what every head adds to the output; returns the names of the tensors that were changed."""
        if self.read_out is None:
            return []
        weight_DQ = self.read_out.weight
        weight_DQ.mul_(gain_H.repeat_interleave(self.facts.head_dim).to(weight_DQ))
        return ["o_proj.weight"]

    @abstractmethod
    def cache_layer(self) -> CacheLayerMixin:
        """An empty state for a new sequence."""

    @abstractmethod
    def state_bytes(self, context: int, dtype_bytes: int = 2) -> int:
        """Bytes that one sequence's state holds after ``context`` tokens, ``dtype_bytes`` a number in the compute dtype."""

    @abstractmethod
    def num_flops_per_token(self, context: int) -> int:
        """Floating-point operations of one forward token at position ``context`` (a multiply-add is two)."""

    def rotate(self, q_BTHK: Tensor, k_BTHK: Tensor, position_embeddings: Rotary | None) -> tuple[Tensor, Tensor]:
        """The family's rotary embedding of q and k, heads behind tokens; ``position_embeddings`` as in :meth:`Mixer.forward`."""
        if not self.facts.rope:
            return q_BTHK, k_BTHK
        if position_embeddings is None:
            raise ModelError(
                f"layer {self.layer_index}: this family hands no position_embeddings to its attention, so a mixer cannot rotate: set `rope: false`"
            )
        q_BHTK, k_BHTK = self.facts.rotate(q_BTHK.transpose(1, 2), k_BTHK.transpose(1, 2), position_embeddings)
        return q_BHTK.transpose(1, 2), k_BHTK.transpose(1, 2)


def expand_groups(weight: Tensor, facts: AttentionFacts, gqa: GroupedHeads = "heads") -> Tensor:
    """Grouped key/value rows ``weight [KV * head_dim, ...]`` as one head a query head, ``[H * head_dim, ...]``.

    Query head ``h`` reads KV head ``h // groups``, so every head is repeated as a whole.  ``rows`` repeats single rows instead, as
    fla-org/hybrid-distillation does: it is a control for experiments, every head of its result is scrambled.
    """
    if gqa == "rows":
        return weight.repeat_interleave(facts.num_groups, dim=0)
    return weight.unflatten(0, (facts.num_kv_heads, -1)).repeat_interleave(facts.num_groups, dim=0).flatten(0, 1)


@torch.no_grad()
def copy_linear(linear: nn.Linear, weight: Tensor, bias: Tensor | None, name: str) -> list[str]:
    """Fill a linear layer with ``weight [O, I]`` and ``bias [O]``; returns the names of what was copied, under ``name``."""
    linear.weight.copy_(weight)
    if linear.bias is None:
        return [f"{name}.weight"]
    assert bias is not None
    linear.bias.copy_(bias)
    return [f"{name}.weight", f"{name}.bias"]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32, or fp64 when any of the ``tensors`` (of any shape) is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def places(
    x_BTHK: Tensor, past_BS: Tensor | None, documents_BT: Tensor | None, padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Position in the document (-1 on padding) and number of the document of every new token, int64 ``[B, T]`` each.

    ``past_BS`` has the positions of the S tokens before, if there are any; ``padding_mask [B, T]`` is True at real tokens.
    """
    batch, num_tokens = x_BTHK.shape[:2]
    if documents_BT is not None:
        steps_T = torch.arange(num_tokens, device=x_BTHK.device)
        begins_BT = F.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0), value=True)
        position_BT = steps_T - torch.where(begins_BT, steps_T, 0).cummax(-1).values
        return torch.where(documents_BT >= 0, position_BT, -1), documents_BT
    if padding_mask is None:
        padding_mask = torch.ones(batch, num_tokens, dtype=torch.bool, device=x_BTHK.device)
    position_BT = padding_mask.long().cumsum(-1) - 1
    if past_BS is not None and past_BS.shape[1]:
        position_BT = position_BT + past_BS.amax(-1, keepdim=True) + 1
    return torch.where(padding_mask.bool(), position_BT, -1), torch.zeros_like(position_BT)
