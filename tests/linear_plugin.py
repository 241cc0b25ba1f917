"""A surgery and a mixer of our own, as a third party would plug them in: plain decayed linear attention, no convolution.

It is the hard case for caches (nothing but a matrix state) and keeps these tests free of the students' room.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.config.base import Part
from limbeck.config.parts.surgeries import SURGERIES
from limbeck.models.state import MixerState, mixer_state
from limbeck.models.structure import AttentionFacts, AttentionView, attention_slot, attention_view, decoder_layers


class DecayOptions(Part):
    """Replace attention by decayed linear attention."""

    kind: Literal["test_decay"] = "test_decay"
    layers: tuple[int, ...] | Literal["all"] = "all"


@dataclass
class Report:
    """What was copied and what is new."""

    copied: list[str]
    fresh: list[str]


class DecayMixer(nn.Module):
    """``S_t = d S_{t-1} + k_t v_t``, ``o_t = q_t S_t``, one recurrent step a token."""

    def __init__(self, facts: AttentionFacts):
        super().__init__()
        self.facts = facts
        width, kv = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
        self.q_proj = nn.Linear(facts.hidden_size, width, bias=facts.q_bias)
        self.k_proj = nn.Linear(facts.hidden_size, kv, bias=facts.k_bias)
        self.v_proj = nn.Linear(facts.hidden_size, kv, bias=facts.v_bias)
        self.o_proj = nn.Linear(width, facts.hidden_size, bias=facts.o_bias)
        norms = facts.new_norms()
        if norms is not None:
            self.q_norm, self.k_norm = norms
        self.decay_H = nn.Parameter(torch.full((facts.num_heads,), 0.9))
        self.register_buffer("gain", torch.tensor(0.25))

    def init_from(self, view: AttentionView) -> Report:
        copied = []
        with torch.no_grad():
            for name in "qkvo":
                projection = getattr(self, f"{name}_proj")
                shape = {"q": "QD", "k": "KD", "v": "KD", "o": "DQ"}[name]
                projection.weight.copy_(getattr(view, f"{name}_weight_{shape}"))
                copied.append(f"{name}_proj.weight")
                if projection.bias is not None:
                    projection.bias.copy_(getattr(view, f"{name}_bias"))
                    copied.append(f"{name}_proj.bias")
            if self.facts.norm_type is not None:
                self.q_norm.load_state_dict(view.q_norm.state_dict())
                self.k_norm.load_state_dict(view.k_norm.state_dict())
                copied += ["q_norm.weight", "k_norm.weight"]
            self.decay_H.fill_(0.9)
            self.gain.fill_(0.25)
        return Report(copied, ["decay_H", "gain"])

    def cache_layer(self) -> MixerState:
        return MixerState()

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        documents_BT: Tensor | None = None,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        facts = self.facts
        B, T, _ = hidden_states.shape
        q, k, v = (p(hidden_states).view(B, T, -1, facts.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if facts.norm_type is not None:
            q, k = facts.normalise(self.q_norm, q), facts.normalise(self.k_norm, k)
        q, k = facts.rotate(q.transpose(1, 2), k.transpose(1, 2), position_embeddings)
        k, v = (x.repeat_interleave(facts.num_groups, dim=1) for x in (k, v.transpose(1, 2)))
        if padding_mask is not None:
            k = k * padding_mask[:, None, :, None]
        held = mixer_state(past_key_values, facts.layer)
        state = held.read("state") if held is not None else None
        if state is None:
            state = k.new_zeros(B, facts.num_heads, facts.head_dim, facts.head_dim)
        outputs = []
        for t in range(T):
            if documents_BT is not None and t > 0:
                same = (documents_BT[:, t] == documents_BT[:, t - 1]).view(B, 1, 1, 1)
                state = state * same
            state = self.decay_H.view(1, -1, 1, 1) * state + k[:, :, t, :, None] * v[:, :, t, None, :]
            outputs.append((q[:, :, t, None, :] @ state).squeeze(2))
        if held is not None:
            held.write(T, state=state)
        out = torch.stack(outputs, 1).flatten(-2) * self.gain
        return self.o_proj(out), None


class DecaySurgery:
    """Replaces attention by :class:`DecayMixer` in the chosen layers."""

    def __init__(self, options: DecayOptions):
        self.options = options

    def resolve(self, model: nn.Module) -> DecayOptions:
        layers = range(len(decoder_layers(model))) if self.options.layers == "all" else self.options.layers
        return DecayOptions(layers=tuple(layers))

    def replaced(self, model: nn.Module) -> list[int]:
        return list(self.options.layers)

    def apply(self, model: nn.Module) -> None:
        layers = decoder_layers(model)
        for index in self.options.layers:
            facts = attention_view(model, index).facts
            setattr(layers[index], attention_slot(layers[index]), DecayMixer(facts))

    def initialise(self, model: nn.Module, base: nn.Module) -> list[Report]:
        layers = decoder_layers(model)
        return [getattr(layers[i], attention_slot(layers[i])).init_from(attention_view(base, i)) for i in self.options.layers]

    def roles(self, model: nn.Module) -> dict[str, str]:
        return {name: "mixers" for name, _ in model.named_parameters() if "decay" in name}


SURGERIES.add(DecayOptions, DecaySurgery)
