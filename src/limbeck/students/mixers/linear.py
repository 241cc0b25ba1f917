"""What the mixers with a matrix state a head have in common: a memory ``S`` [K, V] over the attention's own projections.

    q, k, v = projections of x, copied from the attention, grouped heads expanded to one key/value head a query head
    S <- the mixer's rule ;  o = read of S with q
    out = o_proj( o * SiLU(gate(x)) )                                   an option puts a norm before the gate

What the attention has no counterpart for starts neutral: forget rates do not depend on the input, convolutions pass the current token
through, and the gate is 1 everywhere (zero weight, the bias at which SiLU is 1).

A read that has the scale of the values is what the copied output projection expects.  A norm takes that scale away; its weight then
starts at the scale that the values have for inputs of unit variance, which is too large where the attention averages over many tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from limbeck.config.parts.mixers import MatrixStateOptions
from limbeck.models.state import MixerState, mixer_state
from limbeck.models.structure import AttentionFacts, AttentionView, Rotary
from limbeck.ops.convolution import short_convolution
from limbeck.ops.linear_attention import linear_attention, linear_attention_step
from limbeck.students.mixers.base import GroupedHeads, Measured, Mixer, Report, compute_dtype, copy_linear, expand_groups

OPEN_GATE = 1.278464542761074
"""Where SiLU is 1."""
UP_STD = 0.01
"""Standard deviation of the second of two linears of low rank at the start: gates within a few hundredths of their biases."""
STATE_BYTES = 4
"""The matrix state is fp32 whatever the model computes in."""


class MatrixStateMixer(Mixer):
    """A matrix state per query head, ``[head_dim, head_dim]``; a subclass says what its gates are and what they do to the state."""

    operations: ClassVar[int] = 5
    """Floating-point operations a state entry and token: decay, write (2) and read (2)."""

    def __init__(self, options: Any, facts: AttentionFacts, config: PreTrainedConfig, layer_index: int):
        super().__init__(options, facts, config, layer_index)
        self.options: MatrixStateOptions = options
        model, width = facts.hidden_size, facts.num_heads * facts.head_dim
        self.q_proj = nn.Linear(model, width, bias=facts.q_bias)
        self.k_proj = nn.Linear(model, width, bias=facts.k_bias)
        self.v_proj = nn.Linear(model, width, bias=facts.v_bias)
        self.o_proj = nn.Linear(width, model, bias=facts.o_bias)
        self.keeps_norms = options.keep_qk_norm and facts.norm_type is not None
        if self.keeps_norms:
            self.q_norm, self.k_norm = self._new_norms(facts)
        if options.short_conv:
            for name in "qkv":
                self.register_parameter(f"{name}_conv", nn.Parameter(torch.empty(width, options.short_conv)))
        self._add_gates()
        if options.output_gate:
            self.g_proj = nn.Linear(model, width, bias=options.gate_bias)
        if options.output_norm:
            self.o_norm = nn.Parameter(torch.empty(width))

    @abstractmethod
    def _add_gates(self) -> None:
        """Make the parameters of the mixer's own gates."""

    @abstractmethod
    def _gates(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """What the rule takes beside q, k and v, ``[B, T, H, ...]`` each and at least fp32; zeros are "pass the state on"."""

    @abstractmethod
    def _rule(self, *inputs: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """q, k, v and the gates over whole rows to ``(o_BTHV, state_BHKV)``, with the keywords of the chunked operators."""

    @abstractmethod
    def _step(self, *inputs: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """One token's q, k, v and gates ``[B, H, ...]`` and the state to ``(o_BHV, state_BHKV)``."""

    @abstractmethod
    def _gate_flops(self) -> int:
        """Floating-point operations of the gates' projections for a token."""

    @property
    def _scale(self) -> float:
        """Factor of the read-out."""
        return 1.0

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
        known = set(copied)
        return Report(copied, [name for name, _ in self.named_parameters() if name not in known])

    def _start(self) -> None:
        """The neutral start of what attention has no counterpart for."""
        options = self.options
        if options.short_conv:
            for name in "qkv":
                weight_CW = self.get_parameter(f"{name}_conv").zero_()
                weight_CW[:, -1] = 1
        if options.output_gate:
            if options.gate_bias:
                nn.init.zeros_(self.g_proj.weight)
                nn.init.constant_(self.g_proj.bias, OPEN_GATE)
            else:
                # SiLU(0) is 0: without a bias, small random gates are what lets gradients through.
                self.g_proj.reset_parameters()
        if options.output_norm:
            self.o_norm.copy_(self._value_scale().repeat_interleave(self.facts.head_dim))

    @torch.no_grad()
    def calibrate(self, measured: Measured) -> list[str]:
        """Forget rates, where the mixer learns them."""
        return self._set_rates(measured.rates_H)

    def _set_rates(self, rates_H: Tensor) -> list[str]:
        """Set forget rates a token ``[H]``; returns the names of the tensors.  There are none here."""
        return []

    @property
    def read_out(self) -> nn.Linear | None:
        """The output projection: a read has the scale of the values only roughly."""
        return self.o_proj

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
        """Projections, gates, convolutions and the recurrence."""
        facts, options = self.facts, self.options
        width = facts.num_heads * facts.head_dim
        flops = 2 * facts.hidden_size * width * (4 + options.output_gate) + self._gate_flops()
        return flops + self.operations * width * facts.head_dim + 6 * width * options.short_conv

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
        q, k, v, tail = self._project(hidden_states, held, documents_BT, padding_mask)
        if self.keeps_norms:
            q, k = self.facts.normalise(self.q_norm, q), self.facts.normalise(self.k_norm, k)
        if self.options.rope:
            q, k = self.rotate(q, k, position_embeddings)
        q, k = self._shorten(q), self._shorten(k)
        gates = self._gates(hidden_states)
        if padding_mask is not None:
            # Nothing is written at padding and nothing decays: the state passes through.
            padded_BT = ~padding_mask.bool()
            k, gates = _zero_at(k, padded_BT), tuple(_zero_at(gate, padded_BT) for gate in gates)
        state = held.read("state") if held is not None else None
        if state is not None:
            state = state.to(hidden_states.device)
        if held is not None and q.shape[1] == 1:
            if state is None:
                state = self._empty_state(k, v)
            o_BHV, state = self._step(*(x[:, 0] for x in (q, k, v, *gates)), state, scale=self._scale)
            o = o_BHV[:, None]
        else:
            o, state = self._rule(
                q, k, v, *gates, documents_BT=documents_BT, initial_state_BHKV=state, scale=self._scale, chunk=self.options.chunk
            )
        if held is not None:
            held.write(hidden_states.shape[1], state=state, tail=tail)
        return self.o_proj(self._finish(o, hidden_states)), None

    def _empty_state(self, k_BTHK: Tensor, v_BTHV: Tensor) -> Tensor:
        """The state before the first token ``[B, H, K, V]``."""
        shape = (k_BTHK.shape[0], *k_BTHK.shape[2:], v_BTHV.shape[-1])
        return torch.zeros(shape, dtype=compute_dtype(k_BTHK), device=k_BTHK.device)

    def _keys_and_values(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Projected keys and values ``[B, T, H * K]``."""
        return self.k_proj(x_BTD), self.v_proj(x_BTD)

    def _project(
        self, x_BTD: Tensor, held: MixerState | None, documents_BT: Tensor | None, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v ``[B, T, H, K]`` after convolution and activation, and the convolutions' new tail."""
        options = self.options
        q, (k, v) = self.q_proj(x_BTD), self._keys_and_values(x_BTD)
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


def _zero_at(x: Tensor, where_BT: Tensor) -> Tensor:
    return x.masked_fill(where_BT.reshape(*where_BT.shape, *[1] * (x.ndim - 2)), 0)


def log_uniform_rates(bounds: tuple[float, float], num_heads: int) -> Tensor:
    """Forget rates a token ``[H]``, fp64, that spread log-uniformly over ``bounds``.

    They are quantiles of the distribution, not draws: a few heads then cover the range, whatever the seed.
    """
    low, high = (torch.tensor(bound, dtype=torch.float64).log() for bound in bounds)
    quantiles_H = (torch.arange(num_heads, dtype=torch.float64) + 0.5) / num_heads
    return (low + (high - low) * quantiles_H).exp()


def inverse_softplus(x: Tensor) -> Tensor:
    """Where softplus is ``x`` (> 0, of any shape)."""
    return x.expm1().log()


class DecayingMixer(MatrixStateMixer):
    """Linear attention: nothing is overwritten, so reads grow with the window, and a learned scale a head brings them back.

    The scale starts at the forget rate of the head, one over its effective window: a sum over the window becomes a mean, which is never
    larger than the values.  On the built-in code model (squared error of a fresh layer over its attention's power, mean of 8 layers,
    256 tokens of code): 0.90, where a fresh Gated DeltaNet has 0.81 and silence 1; with a norm in its place 14.9 (0.6 to 2.4 beyond the
    first layer).  Twice the scale would be 0.84, eight times 1.3: how far below the values a mean of cosines lies is left to training.
    """

    def _add_gates(self) -> None:
        if not self.options.output_norm:
            self.read_scale = nn.Parameter(torch.empty(self.facts.num_heads))
        self._add_decay()

    def _add_decay(self) -> None:
        """Make the parameters of the forget gate; there are none here."""

    @abstractmethod
    def _rates(self) -> Tensor:
        """Forget rates a token at the start ``[H]``, fp64."""

    def _start(self) -> None:
        super()._start()
        self._set_read_scale(self._rates())

    def _set_read_scale(self, rates_H: Tensor) -> list[str]:
        if self.options.output_norm:
            return []
        self.read_scale.copy_(-torch.expm1(-rates_H))
        return ["read_scale"]

    def _gate_flops(self) -> int:
        return 0

    def _rule(self, *inputs: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k, v, g = inputs
        return linear_attention(self._scaled(q), k, v, g, **kwargs)

    def _step(self, *inputs: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v, g, state = inputs
        return linear_attention_step(self._scaled(q), k, v, g, state, scale=scale)

    def _scaled(self, q: Tensor) -> Tensor:
        """Queries with the scale of the read on them, heads second to last."""
        return q if self.options.output_norm else q * self.read_scale[:, None].to(q.dtype)
