"""What mixers share that keep the attention's own projections, grouped key/value heads included."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from limbeck.config.parts.mixers import PathOptions, SlidingWindowOptions
from limbeck.errors import ModelError
from limbeck.models.state import MixerState
from limbeck.models.structure import AttentionFacts, AttentionView
from limbeck.students.mixers.base import GroupedHeads, Mixer, copy_linear

POSITION_BYTES = 4
"""Bytes of the position that a state keeps with every key."""


class GroupedMixer(Mixer):
    """Projections and q/k norms of the attention, as they are."""

    options: SlidingWindowOptions | PathOptions

    def __init__(self, options: SlidingWindowOptions | PathOptions, facts: AttentionFacts, config: PreTrainedConfig, layer_index: int):
        super().__init__(options, facts, config, layer_index)
        width, kv_width = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
        self.q_proj = nn.Linear(facts.hidden_size, width, bias=facts.q_bias)
        self.k_proj = nn.Linear(facts.hidden_size, kv_width, bias=facts.k_bias)
        self.v_proj = nn.Linear(facts.hidden_size, kv_width, bias=facts.v_bias)
        self.o_proj = nn.Linear(width, facts.hidden_size, bias=facts.o_bias)
        norms = facts.new_norms()
        if norms is not None:
            self.q_norm, self.k_norm = norms

    @torch.no_grad()
    def copy_attention(self, view: AttentionView, gqa: GroupedHeads) -> list[str]:
        """Copy everything that the attention has; returns its names."""
        if gqa != "heads":
            raise ModelError(
                f"surgery.gqa: 'rows' is a control for mixers that expand grouped heads; {self.options.kind} keeps them grouped: leave `gqa` out"
            )
        copied = copy_linear(self.q_proj, view.q_weight_QD, view.q_bias, "q_proj")
        copied += copy_linear(self.k_proj, view.k_weight_KD, view.k_bias, "k_proj")
        copied += copy_linear(self.v_proj, view.v_weight_KD, view.v_bias, "v_proj")
        copied += copy_linear(self.o_proj, view.o_weight_DQ, view.o_bias, "o_proj")
        if self.facts.norm_type is not None:
            assert view.q_norm is not None and view.k_norm is not None
            for mine, theirs, name in ((self.q_norm, view.q_norm, "q_norm"), (self.k_norm, view.k_norm, "k_norm")):
                mine.load_state_dict(theirs.state_dict())
                copied += [f"{name}.{key}" for key in theirs.state_dict()]
        return copied

    def cache_layer(self) -> MixerState:
        """Keys, values and positions of the tokens that can still be seen, ``[B, S, ...]`` or heads first, as the mixer keeps them."""
        return MixerState()

    def projected(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised q ``[B, T, H, head_dim]`` and k, and v, ``[B, T, KV, head_dim]``."""
        q, k, v = (p(x_BTD).unflatten(-1, (-1, self.facts.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.facts.norm_type is not None:
            q, k = self.facts.normalise(self.q_norm, q), self.facts.normalise(self.k_norm, k)
        return q, k, v

    def projection_flops(self) -> int:
        """Floating-point operations of the four projections of one token."""
        facts = self.facts
        return 2 * facts.hidden_size * facts.head_dim * (2 * facts.num_heads + 2 * facts.num_kv_heads)
