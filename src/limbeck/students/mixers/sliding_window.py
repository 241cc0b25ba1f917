"""Softmax attention over a window and the first tokens of the document (sinks): the honest baseline of every linear mixer.

All projections are the attention's own, grouped heads stay grouped, and what a position sees is a subset of what the attention saw: a
window as long as the context *is* the attention.  Time is linear in the tokens: queries go block by block over the keys of their windows.

The state is a ring in effect: rotated keys and values of at most ``window - 1 + sinks`` tokens, each with its position in the document, so
that what is visible never depends on where in the ring a token lies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from limbeck.config.parts.mixers import SlidingWindowOptions
from limbeck.models.state import MixerState, mixer_state
from limbeck.models.structure import AttentionView, Rotary
from limbeck.students.mixers.base import GroupedHeads, Report, compute_dtype, places
from limbeck.students.mixers.grouped import POSITION_BYTES, GroupedMixer

MIN_BLOCK = 128
"""Queries a block, at least: below this the matrix products are too small to pay for the loop."""


class _Keys(NamedTuple):
    """Keys and values ``[B, KV, S, head_dim]``, and where they stand: position and number of their document ``[B, S]``, position -1 for none."""

    k: Tensor
    v: Tensor
    position: Tensor
    document: Tensor


class SlidingWindow(GroupedMixer):
    """Windowed softmax attention with sinks."""

    options: SlidingWindowOptions

    @property
    def window(self) -> int:
        """Tokens a position sees, itself included; never more than the attention saw."""
        return min(self.options.window, self.facts.sliding_window or self.options.window)

    @property
    def capacity(self) -> int:
        """Tokens that the state holds at most."""
        return self.window - 1 + self.options.sinks

    def init_from(self, view: AttentionView, gqa: GroupedHeads = "heads") -> Report:
        """Copy everything."""
        return Report(self.copy_attention(view, gqa), [])

    def state_bytes(self, context: int, dtype_bytes: int = 2) -> int:
        """Keys, values and positions, up to window and sinks."""
        token = 2 * self.facts.num_kv_heads * self.facts.head_dim * dtype_bytes + POSITION_BYTES
        return min(context, self.capacity) * token

    def num_flops_per_token(self, context: int) -> int:
        """Projections, and scores and sums over what is visible."""
        return self.projection_flops() + 4 * self.facts.num_heads * self.facts.head_dim * min(context, self.capacity + 1)

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
        held: MixerState | None = mixer_state(past_key_values, self.layer_index)
        q, k, v = self.projected(hidden_states)
        q, k = self.rotate(q, k, position_embeddings)
        past = self._past(held, k, v)
        position, document = places(q, None if past is None else past.position, documents_BT, padding_mask)
        new = _Keys(k.transpose(1, 2), v.transpose(1, 2), position, document)
        out_BTHV = self._attend(q.transpose(1, 2), new, past)
        if held is not None:
            self._keep(held, new, past)
        return self.o_proj(out_BTHV.flatten(-2)), None

    def _attend(self, q_BHTK: Tensor, new: _Keys, past: _Keys | None) -> Tensor:
        """Attention output ``[B, T, H, V]``, block by block of queries."""
        num_tokens, size, outputs = q_BHTK.shape[2], max(self.window, MIN_BLOCK), []
        for start in range(0, num_tokens, size):
            end, first = min(start + size, num_tokens), max(start - self.window + 1, 0)
            parts = [_Keys(*(x.narrow(-2 if x.ndim == 4 else -1, first, end - first) for x in new))]
            if first > 0 and self.options.sinks:
                parts.append(self._sinks_before(new, start, first))
            if past is not None:
                parts.append(past)
            keys = parts[0] if len(parts) == 1 else _Keys(*(torch.cat(xs, -2 if xs[0].ndim == 4 else -1) for xs in zip(*parts, strict=True)))
            visible = self._visible(new.position[:, start:end], new.document[:, start:end], keys)
            # A padded query sees itself: a row without any key has no softmax.
            visible[:, :, start - first : end - first].diagonal(dim1=1, dim2=2).fill_(True)
            outputs.append(self._softmax(q_BHTK[:, :, start:end], keys, visible[:, None]))
        return torch.cat(outputs, 2).transpose(1, 2)

    def _visible(self, position_BQ: Tensor, document_BQ: Tensor, keys: _Keys) -> Tensor:
        """Which keys each query sees, bool ``[B, Q, S]``."""
        position_BS = keys.position[:, None, :]
        distance = position_BQ[..., None] - position_BS
        near = (distance < self.window) | (position_BS < self.options.sinks)
        if self.facts.sliding_window is not None:
            near = near & (distance < self.facts.sliding_window)
        return near & (distance >= 0) & (position_BS >= 0) & (document_BQ[..., None] == keys.document[:, None, :])

    def _sinks_before(self, new: _Keys, start: int, first: int) -> _Keys:
        """The sinks, left of ``first``, of the document in which the block begins; documents that begin later have theirs in the window."""
        steps = torch.arange(self.options.sinks, device=new.k.device)
        index = start - new.position[:, start, None] + steps
        inside = (index >= 0) & (index < first)
        index = torch.where(inside, index, 0)
        position, document = (x.gather(1, index) for x in (new.position, new.document))
        position = torch.where(inside & (position == steps), position, -1)
        wide = index[:, None, :, None].expand(-1, new.k.shape[1], -1, new.k.shape[-1])
        return _Keys(new.k.gather(2, wide), new.v.gather(2, wide), position, document)

    def _softmax(self, q_BHQK: Tensor, keys: _Keys, visible: Tensor) -> Tensor:
        facts = self.facts
        if facts.softcap is None:
            return F.scaled_dot_product_attention(
                q_BHQK, keys.k, keys.v, attn_mask=visible, scale=facts.scaling, enable_gqa=facts.num_groups > 1
            )
        k, v = (x.repeat_interleave(facts.num_groups, dim=1) for x in (keys.k, keys.v))
        scores = q_BHQK @ k.mT * facts.scaling
        scores = facts.softcap * torch.tanh(scores / facts.softcap)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=compute_dtype(scores))
        return weights.to(v.dtype) @ v

    def _past(self, held: MixerState | None, k: Tensor, v: Tensor) -> _Keys | None:
        """What the state holds, on the device and in the dtypes of the new keys and values."""
        if held is None or held.read("keys") is None:
            return None
        keys, values, position = (held.states[name].to(k.device) for name in ("keys", "values", "positions"))
        return _Keys(keys.to(k.dtype), values.to(v.dtype), position, torch.zeros_like(position))

    def _keep(self, held: MixerState, new: _Keys, past: _Keys | None) -> None:
        """Keep sinks and the newest tokens; padding goes first, then what has left the window."""
        k, v, position, _ = new if past is None else (torch.cat(xs, -2 if xs[0].ndim == 4 else -1) for xs in zip(past, new, strict=True))
        if position.shape[1] > self.capacity:
            newest = torch.iinfo(position.dtype).max
            rank = torch.where((position >= 0) & (position < self.options.sinks), newest, position)
            index = rank.argsort(stable=True)[:, position.shape[1] - self.capacity :].sort(-1).values
            wide = index[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[-1])
            k, v, position = k.gather(2, wide), v.gather(2, wide), position.gather(1, index)
        held.write(new.k.shape[2], keys=k, values=v, positions=position.to(torch.int32))
