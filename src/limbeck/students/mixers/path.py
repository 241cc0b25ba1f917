"""PaTH (arXiv 2505.16381) in the place of softmax attention: positions are products of data-dependent Householder-like matrices.

    score_ij = scaling * q_i^T H_i ... H_(j+1) k_j       H_t = I - beta_t w_t w_t^T,  beta = 2 sigmoid(b(x)),  w = up(down(x)) / |.|

All projections are the attention's own, grouped heads stay grouped, and one ``w`` serves a key/value head.  With ``rope`` the scores keep
the family's rotation, and as ``beta`` starts small a fresh mixer is nearly the attention; without, it is the paper's.
On a small code model (8 layers) the fresh error is 0.002 of the attention's power with ``rope`` and 0.52 without.

It is priced as softmax attention: the state is a KV cache.  Its keys are carried on at every token (``k <- H k``), so that no ``w`` is
kept; they are in fp32, as what is multiplied a thousand times must be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from limbeck.config.parts.mixers import PathOptions
from limbeck.models.state import MixerState, mixer_state
from limbeck.models.structure import AttentionFacts, AttentionView, Rotary
from limbeck.ops.convolution import short_convolution
from limbeck.ops.path_attention import PathKeys, path_attention
from limbeck.students.mixers.base import GroupedHeads, Report, compute_dtype, places
from limbeck.students.mixers.grouped import POSITION_BYTES, GroupedMixer

KEY_BYTES = 4


class PathAttention(GroupedMixer):
    """Softmax attention over all tokens, with a path between a query and a key in the place of, or on top of, a rotation."""

    options: PathOptions

    def __init__(self, options: PathOptions, facts: AttentionFacts, config: PreTrainedConfig, layer_index: int):
        super().__init__(options, facts, config, layer_index)
        kv_width = facts.num_kv_heads * facts.head_dim
        self.w_down = nn.Linear(facts.hidden_size, options.path_rank, bias=False)
        self.w_up = nn.Linear(options.path_rank, kv_width, bias=False)
        if options.short_conv:
            self.w_conv = nn.Parameter(torch.empty(kv_width, options.short_conv))
        self.b_proj = nn.Linear(facts.hidden_size, facts.num_kv_heads)

    @torch.no_grad()
    def init_from(self, view: AttentionView, gqa: GroupedHeads = "heads") -> Report:
        """Copy everything that the attention has; paths start random in direction and short in effect."""
        copied = self.copy_attention(view, gqa)
        self.w_down.reset_parameters()
        self.w_up.reset_parameters()
        if self.options.short_conv:
            self.w_conv.zero_()[:, -1] = 1
        nn.init.zeros_(self.b_proj.weight)
        self.b_proj.bias.fill_(float(torch.tensor(self.options.beta_init / 2, dtype=torch.float64).logit()))
        known = set(copied)
        return Report(copied, [name for name, _ in self.named_parameters() if name not in known])

    def state_bytes(self, context: int, dtype_bytes: int = 2) -> int:
        """Grows with the context, as a KV cache does; keys are fp32."""
        kv_width = self.facts.num_kv_heads * self.facts.head_dim
        tail = kv_width * max(self.options.short_conv - 1, 0) * dtype_bytes
        return context * (kv_width * (KEY_BYTES + dtype_bytes) + POSITION_BYTES) + tail

    def num_flops_per_token(self, context: int) -> int:
        """Projections, scores and sums over the context, and the keys' step along the path."""
        facts, options = self.facts, self.options
        kv_width, rank = facts.num_kv_heads * facts.head_dim, options.path_rank
        path = 2 * facts.hidden_size * (rank + facts.num_kv_heads) + 2 * rank * kv_width + 2 * kv_width * options.short_conv
        return self.projection_flops() + path + 4 * (facts.num_heads * facts.head_dim + kv_width) * context

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
        """``hidden_states [B, T, D]`` to the same; see :meth:`Mixer.forward`."""
        facts = self.facts
        held: MixerState | None = mixer_state(past_key_values, self.layer_index)
        q, k, v = self.projected(hidden_states)
        if self.options.rope:
            q, k = self.rotate(q, k, position_embeddings)
        past = _past(held, k)
        position, document = places(q, None if past is None else past.position, documents_BT, padding_mask)
        new = PathKeys(k, v, position, document)
        w, beta, tail = self._path(hidden_states, held, documents_BT, padding_mask)
        beta = beta.masked_fill((position < 0)[..., None], 0)
        out, keys = path_attention(
            q.unflatten(2, (facts.num_kv_heads, -1)), w, beta, new, past,
            scale=facts.scaling, softcap=facts.softcap, window=facts.sliding_window, chunk=self.options.chunk,
        )  # fmt: skip
        if held is not None:
            if past is not None:
                v, position = torch.cat([past.v.to(v.dtype), v], 1), torch.cat([past.position, position], 1)
            held.write(hidden_states.shape[1], keys=keys, values=v, positions=position.to(torch.int32), tail=tail)
        return self.o_proj(out.flatten(2)), None

    def _path(
        self, x_BTD: Tensor, held: MixerState | None, documents_BT: Tensor | None, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Unit directions ``[B, T, J, K]`` and strengths ``[B, T, J]`` in at least fp32, and the convolution's new tail."""
        w, tail = self.w_up(self.w_down(x_BTD)), None
        if self.options.short_conv:
            if documents_BT is None and padding_mask is not None:
                documents_BT = padding_mask.long() - 1
            before = held.read("tail") if held is not None else None
            before = None if before is None else before.to(w.device)
            w, tail = short_convolution(w, self.w_conv, documents_BT=documents_BT, tail_BCW=before)
        w = w.to(compute_dtype(w)).unflatten(-1, (self.facts.num_kv_heads, -1))
        beta = 2 * self.b_proj(x_BTD).to(w.dtype).sigmoid()
        return w * torch.rsqrt(w.square().sum(-1, keepdim=True) + 1e-6), beta, tail


def _past(held: MixerState | None, k: Tensor) -> PathKeys | None:
    """What the state holds, on the device of the new keys."""
    if held is None or held.read("keys") is None:
        return None
    keys, values, position = (held.states[name].to(k.device) for name in ("keys", "values", "positions"))
    return PathKeys(keys, values, position, torch.zeros_like(position))
