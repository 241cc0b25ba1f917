"""RWKV-7 (arXiv 2503.14456) in the place of softmax attention.

    x_j = x + mu_j (x_before - x)                                   token shift, j in q, k, v, decay, strength, gate
    w = exp(-e^(-1/2) sigmoid(w(x_w))) ;  a = sigmoid(a(x_a)) ;  c = k kappa / |k kappa| ;  k~ = k (1 + (a - 1) alpha)
    v <- v + (v_first - v) sigmoid(v(x_v))
    S <- diag(w) S - (a c) (S^T c)^T + k~ v^T ;   o = S^T q + (q . rho k~) v

around it what :mod:`limbeck.students.mixers.linear` says: its SiLU gate and optional norm stand for the paper's gate and group norm.
``w``, ``a`` and ``v`` are of low rank with a bias.  It starts as a fresh Gated DeltaNet does (no shift, a = 1/2, kappa = alpha = 1,
rho = 0, q and k of unit length), up to the small random weights without which a low-rank pair would have no gradient.
On a small code model the fresh error is Gated DeltaNet's, 0.73 of the attention's power in the mean over 8 layers.

``v_first`` are the values of the first RWKV-7 layer, be it layer 0 or not, of the same tokens in the same forward pass
(:mod:`limbeck.models.across`).  Where layers are called one by one, as in alignment, nobody brings it: a layer then is its own first and
the mix has no effect and no gradient, so it starts nearly shut.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from limbeck.models.across import AcrossLayers
from limbeck.models.state import MixerState, mixer_state
from limbeck.models.structure import Rotary
from limbeck.ops.convolution import short_convolution
from limbeck.ops.rwkv7 import generalised_delta_rule, generalised_delta_rule_step
from limbeck.students.mixers.base import compute_dtype
from limbeck.students.mixers.linear import UP_STD, MatrixStateMixer, log_uniform_rates

FASTEST = 0.6065306597126334
"""``e^(-1/2)``: no channel forgets faster, which keeps the inverse of a decay below two."""
NEARLY_SHUT = -4.0
"""The mix with the first layer's values starts with weight 0.018."""
STREAMS = ("q", "k", "v", "w", "a", "g")


class Rwkv7(MatrixStateMixer):
    """A decay a channel, and a removal key of its own."""

    options: Any
    operations = 9
    carries_across_layers = True

    def _add_gates(self) -> None:
        model, width, rank = self.facts.hidden_size, self.facts.num_heads * self.facts.head_dim, self.options.rank
        if self.options.token_shift:
            self.shift = nn.Parameter(torch.empty(len(STREAMS), model))
        for name in self._low_rank:
            self.add_module(f"{name}_down", nn.Linear(model, rank, bias=False))
            self.add_module(f"{name}_up", nn.Linear(rank, width))
        for name in ("kappa", "alpha", "rho"):
            self.register_parameter(name, nn.Parameter(torch.empty(width)))

    @property
    def _low_rank(self) -> tuple[str, ...]:
        """The very first layer of a model has no values before its own."""
        return ("w", "a", "v") if self.layer_index > 0 else ("w", "a")

    def _start(self) -> None:
        super()._start()
        if self.options.token_shift:
            nn.init.zeros_(self.shift)
        biases = {"w": 0.0, "a": 0.0, "v": NEARLY_SHUT}
        for name in self._low_rank:
            down, up = self.get_submodule(f"{name}_down"), self.get_submodule(f"{name}_up")
            assert isinstance(down, nn.Linear) and isinstance(up, nn.Linear)
            down.reset_parameters()
            nn.init.normal_(up.weight, std=UP_STD)
            nn.init.constant_(up.bias, biases[name])
        self._set_rates(log_uniform_rates(self.options.decay_init, self.facts.num_heads))
        nn.init.ones_(self.kappa)
        nn.init.ones_(self.alpha)
        nn.init.zeros_(self.rho)

    def _set_rates(self, rates_H: Tensor) -> list[str]:
        up = self.get_submodule("w_up")
        assert isinstance(up, nn.Linear)
        up.bias.copy_((rates_H / FASTEST).logit().repeat_interleave(self.facts.head_dim))
        return ["w_up.bias"]

    def _gate_flops(self) -> int:
        return 2 * len(self._low_rank) * self.options.rank * (self.facts.hidden_size + self.facts.num_heads * self.facts.head_dim)

    def state_bytes(self, context: int, dtype_bytes: int = 2) -> int:
        """The same at every context: the matrix states in fp32, and the last token's input."""
        return super().state_bytes(context, dtype_bytes) + self.facts.hidden_size * dtype_bytes * self.options.token_shift

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotary | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        documents_BT: Tensor | None = None,
        padding_mask: Tensor | None = None,
        across_layers: AcrossLayers | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """``hidden_states [B, T, D]`` to the same; see :meth:`Mixer.forward`.  ``across_layers`` brings the first layer's
        values."""
        held: MixerState | None = mixer_state(past_key_values, self.layer_index)
        x, tail = self._shifted(hidden_states, held, documents_BT, padding_mask)
        heads = (self.facts.num_heads, self.facts.head_dim)
        q, k, v = (project(x[name]).unflatten(-1, heads) for name, project in (("q", self.q_proj), ("k", self.k_proj), ("v", self.v_proj)))
        first = (across_layers or AcrossLayers()).first("values", v).to(v.device)
        if self.layer_index > 0:
            v = v + (first - v) * self._low("v", x["v"]).sigmoid().to(v.dtype)
        if self.keeps_norms:
            q, k = self.facts.normalise(self.q_norm, q), self.facts.normalise(self.k_norm, k)
        if self.options.rope:
            q, k = self.rotate(q, k, position_embeddings)
        q, k = self._shorten(q), self._shorten(k)
        o, state = self._recur(q, k, v, x, held, documents_BT, padding_mask)
        if held is not None:
            held.write(hidden_states.shape[1], state=state, tail=tail)
        return self.o_proj(self._finish(o, x["g"])), None

    def _shifted(
        self, x_BTD: Tensor, held: MixerState | None, documents_BT: Tensor | None, padding_mask: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The input of every stream, moved towards the token before, and the last token's input ``[B, D, 1]``."""
        if not self.options.token_shift:
            return dict.fromkeys(STREAMS, x_BTD), None
        if documents_BT is None and padding_mask is not None:
            documents_BT = padding_mask.long() - 1
        tail = held.read("tail") if held is not None else None
        taps_D2 = x_BTD.new_tensor([1.0, 0.0]).expand(x_BTD.shape[-1], 2)
        before_BTD, tail = short_convolution(
            x_BTD, taps_D2, documents_BT=documents_BT, tail_BCW=None if tail is None else tail.to(x_BTD.device)
        )
        step_BTD = before_BTD - x_BTD
        return {name: x_BTD + step_BTD * mu_D.to(x_BTD.dtype) for name, mu_D in zip(STREAMS, self.shift, strict=True)}, tail

    def _low(self, name: str, x_BTD: Tensor) -> Tensor:
        """A low-rank pair's ``[B, T, H, K]``, at least fp32; the decay's has a tanh inside."""
        inner = self.get_submodule(f"{name}_down")(x_BTD)
        made = self.get_submodule(f"{name}_up")(inner.tanh() if name == "w" else inner)
        return made.to(compute_dtype(made, self.o_proj.weight)).unflatten(-1, (self.facts.num_heads, -1))

    def _recur(
        self, q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor], held: MixerState | None, documents_BT: Tensor | None, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Output ``[B, T, H, V]`` and state."""
        g, strength = self._gates(x["w"], x["a"])
        kappa, alpha, rho = (p.to(k.dtype).unflatten(-1, (self.facts.num_heads, -1)) for p in (self.kappa, self.alpha, self.rho))
        removal = F.normalize(k * kappa, dim=-1, eps=1e-6)
        k = k * (1 + (strength - 1) * alpha)
        bonus_BTH1 = (q * k * rho).sum(-1, keepdim=True)
        # The paper reads before the decay, the operator after it.
        read, write = removal * torch.exp(-g), -strength * removal
        if padding_mask is not None:
            padded = ~padding_mask.bool()[..., None, None]
            k, g, write = k.masked_fill(padded, 0), g.masked_fill(padded, 0), write.masked_fill(padded, 0)
        state = held.read("state") if held is not None else None
        state = None if state is None else state.to(v.device)
        if held is not None and v.shape[1] == 1:
            state = self._empty_state(k, v) if state is None else state
            o_BHV, state = self._step(*(y[:, 0] for y in (q, k, v, g, read, write)), state, scale=self._scale)
            o = o_BHV[:, None]
        else:
            o, state = self._rule(
                q, k, v, g, read, write, documents_BT=documents_BT, initial_state_BHKV=state, scale=self._scale, chunk=self.options.chunk
            )
        return o + (bonus_BTH1 * v).to(o.dtype), state

    def _gates(self, x_BTD: Tensor, a_BTD: Tensor | None = None) -> tuple[Tensor, ...]:
        """Log decay of its input and strength of its own (or the same), ``[B, T, H, K]`` each."""
        return -FASTEST * self._low("w", x_BTD).sigmoid(), self._low("a", x_BTD if a_BTD is None else a_BTD).sigmoid()

    def _rule(self, *inputs: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k, v, g, a, b = inputs
        return generalised_delta_rule(q, k, v, g, a, b, **kwargs)

    def _step(self, *inputs: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v, g, a, b, state = inputs
        return generalised_delta_rule_step(q, k, v, g, a, b, state, scale=scale)
