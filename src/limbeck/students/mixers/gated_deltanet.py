"""Gated DeltaNet (arXiv 2412.06464) in the place of softmax attention.

    q, k, v = projections of x, copied from the attention, grouped heads expanded to one key/value head a query head
    S <- e^g S ;  S <- S + k (beta (v - S^T k))^T ;  o = S^T q          g = -e^A softplus(a(x) + dt),  beta = sigmoid(b(x))
    out = o_proj( o * SiLU(gate(x)) )                     q, k of unit length; an option puts a norm before the gate

What the attention has no counterpart for starts neutral, so that a fresh mixer is a plain decaying memory over the attention's own
projections: the forget rates are set by ``decay_init`` alone (a = 0), every write has strength 1/2 (b = 0), convolutions pass the
current token through, and the gate is 1 everywhere (zero weight, the bias at which SiLU is 1).

Scale: reading a stored unit key gives its value back, so an output has the scale of values, as the attention's has.  A norm takes that
scale away; its weight then starts at the scale that the values have for inputs of unit variance, which is too large where the attention
averages over many tokens (on a small code model the first layer's fresh error was ten times its output, and 1.3 times without the norm).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from limbeck.config.parts.mixers import GatedDeltaNetOptions
from limbeck.models.state import MixerState, mixer_state
from limbeck.models.structure import AttentionFacts, AttentionView, Rotary
from limbeck.ops.convolution import short_convolution
from limbeck.ops.delta_rule import gated_delta_rule, gated_delta_rule_step
from limbeck.students.mixers.base import GroupedHeads, Mixer, Report, compute_dtype, copy_linear, expand_groups

OPEN_GATE = 1.278464542761074
"""Where SiLU is 1."""
STATE_BYTES = 4
"""The matrix state is fp32 whatever the model computes in."""


class GatedDeltaNet(Mixer):
    """A matrix state per query head, ``[head_dim, head_dim]``."""

    def __init__(self, options: GatedDeltaNetOptions, facts: AttentionFacts, config: PreTrainedConfig, layer_index: int):
        super().__init__(options, facts, config, layer_index)
        self.options: GatedDeltaNetOptions = options
        model, heads, width = facts.hidden_size, facts.num_heads, facts.num_heads * facts.head_dim
        self.q_proj = nn.Linear(model, width, bias=facts.q_bias)
        self.k_proj = nn.Linear(model, width, bias=facts.k_bias)
        self.v_proj = nn.Linear(model, width, bias=facts.v_bias)
        self.o_proj = nn.Linear(width, model, bias=facts.o_bias)
        self.keeps_norms = options.keep_qk_norm and facts.norm_type is not None
        if self.keeps_norms:
            self.q_norm, self.k_norm = self._new_norms(facts)
        if options.deep_kv:
            self.k_deep, self.v_deep = nn.Linear(width, width), nn.Linear(width, width)
        if options.short_conv:
            for name in "qkv":
                self.register_parameter(f"{name}_conv", nn.Parameter(torch.empty(width, options.short_conv)))
        if options.decay == "learned":
            self.a_proj = nn.Linear(model, heads, bias=False)
            self.A_log = nn.Parameter(torch.empty(heads))
            self.dt_bias = nn.Parameter(torch.empty(heads))
        if options.beta == "learned":
            self.b_proj = nn.Linear(model, heads, bias=False)
        if options.output_gate:
            self.g_proj = nn.Linear(model, width, bias=options.gate_bias)
        if options.output_norm:
            self.o_norm = nn.Parameter(torch.empty(width))

    @staticmethod
    def _new_norms(facts: AttentionFacts) -> tuple[nn.Module, nn.Module]:
        """The family's q and k norms, the key's widened to the expanded heads.

        A norm over the full width is the same for expanded keys: repeating every KV head equally often leaves the mean square as it was.
        """
        assert facts.norm_type is not None
        shape = facts.norm_shapes[0]
        size = shape[0] if len(shape) == 1 else shape
        return facts.norm_type(size, eps=facts.norm_eps), facts.norm_type(size, eps=facts.norm_eps)

    @torch.no_grad()
    def init_from(self, view: AttentionView, gqa: GroupedHeads = "heads") -> Report:
        """Copy projections, biases and norms with grouped heads expanded; set everything else to its neutral start."""
        facts = self.facts

        def expand(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else expand_groups(tensor, facts, gqa)

        copied = copy_linear(self.q_proj, view.q_weight_QD, view.q_bias, "q_proj")
        copied += copy_linear(self.k_proj, expand(view.k_weight_KD), expand(view.k_bias), "k_proj")
        copied += copy_linear(self.v_proj, expand(view.v_weight_KD), expand(view.v_bias), "v_proj")
        copied += copy_linear(self.o_proj, view.o_weight_DQ, view.o_bias, "o_proj")
        if self.keeps_norms:
            assert view.q_norm is not None and view.k_norm is not None
            for mine, theirs, name in ((self.q_norm, view.q_norm, "q_norm"), (self.k_norm, view.k_norm, "k_norm")):
                for key, tensor in theirs.state_dict().items():
                    target = mine.get_parameter(key)
                    target.copy_(tensor if tensor.shape == target.shape else expand_groups(tensor, facts, gqa))
                    copied.append(f"{name}.{key}")
        self._start()
        if self.options.output_norm:
            self.o_norm.copy_(self._value_scale().repeat_interleave(facts.head_dim))
        known = set(copied)
        return Report(copied, [name for name, _ in self.named_parameters() if name not in known])

    def _start(self) -> None:
        """The neutral start of what attention has no counterpart for."""
        options, heads = self.options, self.facts.num_heads
        if options.deep_kv:
            for linear in (self.k_deep, self.v_deep):
                nn.init.eye_(linear.weight)
                nn.init.zeros_(linear.bias)
        if options.short_conv:
            for name in "qkv":
                weight_CW = self.get_parameter(f"{name}_conv").zero_()
                weight_CW[:, -1] = 1
        if options.decay == "learned":
            low, high = (torch.tensor(bound, dtype=torch.float64).log() for bound in options.decay_init)
            # Quantiles of the log-uniform distribution, not draws: a few heads then cover the range, whatever the seed.
            quantiles_H = (torch.arange(heads, dtype=torch.float64) + 0.5) / heads
            step_H = (low + (high - low) * quantiles_H).exp()
            nn.init.zeros_(self.a_proj.weight)
            nn.init.zeros_(self.A_log)
            self.dt_bias.copy_(step_H.expm1().log())
        if options.beta == "learned":
            nn.init.zeros_(self.b_proj.weight)
        if options.output_gate:
            if options.gate_bias:
                nn.init.zeros_(self.g_proj.weight)
                nn.init.constant_(self.g_proj.bias, OPEN_GATE)
            else:
                # SiLU(0) is 0: without a bias, small random gates are what lets gradients through.
                self.g_proj.reset_parameters()

    def _value_scale(self) -> Tensor:
        """Root mean square of each head's values for inputs of unit variance ``[H]``: the scale of a head that attends to one token."""
        power_H = self.v_proj.weight.square().sum(1).unflatten(0, (self.facts.num_heads, -1)).mean(1)
        if self.v_proj.bias is not None:
            power_H = power_H + self.v_proj.bias.square().unflatten(0, (self.facts.num_heads, -1)).mean(1)
        return power_H.sqrt()

    def cache_layer(self) -> MixerState:
        """State ``[B, H, K, V]`` and the convolutions' last inputs ``[B, 3 * H * K, short_conv - 1]``."""
        return MixerState()

    def state_bytes(self, context: int, dtype_bytes: int = 2) -> int:
        """The same at every context: the matrix states in fp32 and the convolutions' tails."""
        width = self.facts.num_heads * self.facts.head_dim
        return width * self.facts.head_dim * STATE_BYTES + 3 * width * max(self.options.short_conv - 1, 0) * dtype_bytes

    def num_flops_per_token(self, context: int) -> int:
        """Projections, convolutions and the recurrence (decay, read, write and output: seven operations a state entry)."""
        facts, options = self.facts, self.options
        width = facts.num_heads * facts.head_dim
        columns = width * (4 + options.output_gate) + facts.num_heads * ((options.beta == "learned") + (options.decay == "learned"))
        flops = 2 * facts.hidden_size * columns + 7 * width * facts.head_dim + 6 * width * options.short_conv
        return flops + (4 * width * width if options.deep_kv else 0)

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
        """``[B, T, D]`` to the same; see :meth:`Mixer.forward`."""
        held: MixerState | None = mixer_state(past_key_values, self.layer_index)
        q, k, v, tail = self._project(hidden_states, held, documents_BT, padding_mask)
        if self.keeps_norms:
            q, k = self.facts.normalise(self.q_norm, q), self.facts.normalise(self.k_norm, k)
        if self.options.rope:
            q, k = self.rotate(q, k, position_embeddings)
        q, k = self._shorten(q), self._shorten(k)
        g_BTH, beta_BTH = self._gates(hidden_states)
        if padding_mask is not None:
            # Nothing is written at padding and nothing decays: the state passes through.
            real_BT1 = padding_mask[..., None].bool()
            g_BTH, beta_BTH = g_BTH.masked_fill(~real_BT1, 0), beta_BTH.masked_fill(~real_BT1, 0)
        state = held.read("state") if held is not None else None
        if state is not None:
            state = state.to(hidden_states.device)
        if held is not None and q.shape[1] == 1:
            if state is None:
                state = torch.zeros(*k.shape[0:1], *k.shape[2:], v.shape[-1], dtype=compute_dtype(k), device=k.device)
            o_BHV, state = gated_delta_rule_step(q[:, 0], k[:, 0], v[:, 0], g_BTH[:, 0], beta_BTH[:, 0], state, scale=self._scale)
            o = o_BHV[:, None]
        else:
            o, state = gated_delta_rule(
                q, k, v, g_BTH, beta_BTH, documents_BT=documents_BT, initial_state_BHKV=state, scale=self._scale, chunk=self.options.chunk
            )
        if held is not None:
            held.write(hidden_states.shape[1], state=state, tail=tail)
        return self.o_proj(self._finish(o, hidden_states)), None

    @property
    def _scale(self) -> float:
        """Factor of the read-out.  Reading a stored unit key gives its value back, so 1; under a norm the factor has no effect but for
        its epsilon, and head_dim ** -0.5 is what implementations of Gated DeltaNet have there."""
        return self.facts.head_dim**-0.5 if self.options.output_norm else 1.0

    def _project(
        self, x_BTD: Tensor, held: MixerState | None, documents_BT: Tensor | None, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v ``[B, T, H, K]`` after convolution and activation, and the convolutions' new tail."""
        options = self.options
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if options.deep_kv:
            k, v = self.k_deep(k), self.v_deep(v)
        tail = None
        if options.short_conv:
            qkv = torch.cat([q, k, v], -1)
            if padding_mask is not None:
                qkv = qkv * padding_mask[..., None].to(qkv.dtype)
            weight_CW = torch.cat([self.q_conv, self.k_conv, self.v_conv])
            before = held.read("tail") if held is not None else None
            before = None if before is None else before.to(qkv.device)
            qkv, tail = short_convolution(qkv, weight_CW, documents_BT=documents_BT, tail_BCW=before)
            q, k, v = qkv.chunk(3, -1)
        if options.activation == "silu":
            q, k = F.silu(q), F.silu(k)
            v = F.silu(v) if options.activate_v else v
        heads = (self.facts.num_heads, self.facts.head_dim)
        return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads), tail

    def _shorten(self, x_BTHK: Tensor) -> Tensor:
        """Unit length a head, or a fixed factor that gives unit length to a head of unit variance."""
        x = x_BTHK.to(compute_dtype(x_BTHK))
        if self.options.qk_norm == "none":
            return x * self.facts.head_dim**-0.5
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    def _gates(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Log decay and write strength ``[B, T, H]``, at least fp32: a rate near 1 has no bits left in bf16."""
        shape = (*x_BTD.shape[:2], self.facts.num_heads)
        dtype = compute_dtype(x_BTD, self.o_proj.weight)
        if self.options.decay == "learned":
            g_BTH = -self.A_log.to(dtype).exp() * F.softplus(self.a_proj(x_BTD).to(dtype) + self.dt_bias.to(dtype))
        else:
            g_BTH = torch.zeros(shape, dtype=dtype, device=x_BTD.device)
        if self.options.beta == "learned":
            beta_BTH = self.b_proj(x_BTD).to(dtype).sigmoid()
        else:
            beta_BTH = torch.ones(shape, dtype=dtype, device=x_BTD.device)
        return g_BTH, beta_BTH

    def _finish(self, o_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """Norm a head, gate, and heads side by side: ``[B, T, H * V]``."""
        o = o_BTHV.to(compute_dtype(o_BTHV))
        if self.options.output_norm:
            o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + self.facts.norm_eps)
        o = o.flatten(-2)
        if self.options.output_norm:
            o = o * self.o_norm
        if self.options.output_gate:
            o = o * F.silu(self.g_proj(x_BTD).to(o.dtype))
        return o.to(o_BTHV.dtype)
