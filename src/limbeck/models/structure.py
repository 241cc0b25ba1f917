"""Where attention sits in a model and what it is made of, read from the modules and not from a table of families."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from limbeck.errors import ModelError
from limbeck.models.head import backbone

SLOTS = ("self_attn", "attention", "self_attention", "attn")
LINEAR_SLOTS = ("linear_attn", "mamba", "mixer", "temporal_block", "conv", "short_conv", "time_mixer")
MLA_NAMES = ("kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj")
OUTPUTS = ("o_proj", "out_proj", "dense")

Rotary = tuple[Tensor, Tensor]
"""``(cos, sin)`` as transformers hands them down, ``[B or 1, T, rotary width]``."""


def layer_list(model: PreTrainedModel) -> nn.ModuleList:
    """The one list of ``num_hidden_layers`` modules that each hold one attention or mixer, of whatever kind."""
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    lists = [
        (path, module)
        for path, module in backbone(model).named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers and _is_layer(module[0])
    ]
    if not lists:
        raise ModelError(
            f"{name} has no list of {config.num_hidden_layers} decoder layers with attention ({', '.join(SLOTS)}): "
            "Limbeck does not know this family's structure"
        )
    if len(lists) > 1:
        raise ModelError(
            f"{name} has several lists of decoder layers ({', '.join(path for path, _ in lists)}): load its text model alone"
        )
    return lists[0][1]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers, each with softmax attention or a mixer of ours in its place.

    Encoder-decoder models, multi-head latent attention and layers that are linear already are refused by name.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder: Limbeck converts decoder-only causal language models")
    layers = layer_list(model)
    for index, layer in enumerate(layers):
        linear = [slot for slot in LINEAR_SLOTS if isinstance(getattr(layer, slot, None), nn.Module)]
        if linear:
            raise ModelError(
                f"{name}: layer {index} is linear already (`{linear[0]}`): Limbeck converts models whose layers are "
                "all softmax attention"
            )
        latent = [part for part in MLA_NAMES if hasattr(getattr(layer, attention_slot(layer)), part)]
        if latent:
            raise ModelError(
                f"{name}: layer {index} uses multi-head latent attention (`{latent[0]}`), which Limbeck does not convert"
            )
    return layers


def _is_layer(module: nn.Module) -> bool:
    children = dict(module.named_children())
    return any(slot in children for slot in (*SLOTS, *LINEAR_SLOTS))


def attention_slot(layer: nn.Module) -> str:
    """Name of the attention (or mixer) child of a decoder layer, ``self_attn`` in most families."""
    found = [slot for slot in SLOTS if isinstance(getattr(layer, slot, None), nn.Module)]
    if len(found) != 1:
        children = ", ".join(name for name, _ in layer.named_children())
        raise ModelError(
            f"{type(layer).__name__} has {len(found) or 'no'} attention modules among its children ({children}), "
            f"needs one of {', '.join(SLOTS)}"
        )
    return found[0]


def mixing_slot(layer: nn.Module) -> str:
    """Name of the child that mixes a decoder layer's tokens: its attention, or the linear attention that a family has of its own."""
    own = [slot for slot in LINEAR_SLOTS if isinstance(getattr(layer, slot, None), nn.Module)]
    return own[0] if own else attention_slot(layer)


@dataclass(frozen=True)
class AttentionFacts:
    """What a replacement must know of an attention layer; no tensors."""

    layer: int
    """Index from 0."""
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_bias: bool
    k_bias: bool
    v_bias: bool
    o_bias: bool
    qk_norm: Literal["none", "head", "full"]
    """Norm of q and k before the rotation: none, over each head's width (Qwen3), or over the whole width (OLMo2)."""
    norm_eps: float
    scaling: float
    """Factor on ``q @ k``."""
    softcap: float | None
    """``c * tanh(x / c)`` on the attention scores (Gemma 2)."""
    sliding_window: int | None
    """Tokens a position sees in this layer; None for all."""
    rope: bool
    """Whether this layer rotates q and k (SmolLM3 has layers that do not)."""
    norm_type: type[nn.Module] | None = field(repr=False, default=None)
    norm_shapes: tuple[tuple[int, ...], tuple[int, ...]] = field(repr=False, default=((), ()))
    apply_rotary: Callable[..., Rotary] | None = field(repr=False, default=None)

    @property
    def num_groups(self) -> int:
        """Query heads a key/value head."""
        return self.num_heads // self.num_kv_heads

    def new_norms(self) -> tuple[nn.Module, nn.Module] | None:
        """Fresh q and k norms of the family's own class (Gemma's weight is an offset from one), or None."""
        if self.norm_type is None:
            return None
        q, k = (self.norm_type(shape[0] if len(shape) == 1 else shape, eps=self.norm_eps) for shape in self.norm_shapes)
        return q, k

    def normalise(self, norm: nn.Module, x_BTHK: Tensor) -> Tensor:
        """A q or k norm applied as the family does it, ``[B, T, H, K]`` to the same."""
        if self.qk_norm == "full":
            return norm(x_BTHK.flatten(-2)).view(x_BTHK.shape)
        return norm(x_BTHK)

    def rotate(self, q_BHTK: Tensor, k_BHTK: Tensor, position_embeddings: Rotary) -> Rotary:
        """The family's own rotary embedding of q and k, ``[B, H, T, K]`` each; a partial rotation leaves the tail as it is.

        ``position_embeddings`` are ``[B, T, W]`` each: the family's cos and sin of the W <= K channels that it rotates.
        """
        if not self.rope:
            return q_BHTK, k_BHTK
        if self.apply_rotary is None:
            raise ModelError(
                f"layer {self.layer}: this family has no apply_rotary_pos_emb(q, k, cos, sin) that Limbeck can use: "
                "set `rope: false`"
            )
        cos, sin = position_embeddings
        width = cos.shape[-1]
        if width >= self.head_dim:
            return self.apply_rotary(q_BHTK, k_BHTK, cos, sin)
        q, k = self.apply_rotary(q_BHTK[..., :width], k_BHTK[..., :width], cos, sin)
        return torch.cat([q, q_BHTK[..., width:]], -1), torch.cat([k, k_BHTK[..., width:]], -1)


class AttentionView:
    """A softmax attention layer's projections, biases and norms under one set of names.

    ``q_weight_QD``, ``k_weight_KD``, ``v_weight_KD``, ``o_weight_DQ`` and the biases ``q_bias`` ... ``o_bias`` (None where
    there is none) are detached views of the module's own tensors, split where the family fuses them; Q = H * head_dim, K = KV
    heads * head_dim.
    """

    def __init__(self, attention: nn.Module, config: PreTrainedConfig, layer: int):
        self.name = type(attention).__name__
        self.layer = layer
        output = next((name for name in OUTPUTS if isinstance(getattr(attention, name, None), nn.Linear)), None)
        fused = isinstance(getattr(attention, "qkv_proj", None), nn.Linear)
        separate = all(isinstance(getattr(attention, name, None), nn.Linear) for name in ("q_proj", "k_proj", "v_proj"))
        if output is None or not (fused or separate):
            children = ", ".join(name for name, _ in attention.named_children())
            raise ModelError(
                f"layer {layer}: {self.name} has no q_proj, k_proj, v_proj (or qkv_proj) and o_proj that Limbeck can "
                f"read, only: {children}"
            )
        o_proj = getattr(attention, output)
        head_dim = (
            getattr(attention, "head_dim", None)
            or getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads
        )
        width = o_proj.in_features
        self.o_weight_DQ, self.o_bias = _detached(o_proj.weight), _detached(o_proj.bias)
        if fused:
            rows = (attention.qkv_proj.out_features - width) // 2
            weights = _detached(attention.qkv_proj.weight).split([width, rows, rows])
            bias = _detached(attention.qkv_proj.bias)
            biases = (None, None, None) if bias is None else bias.split([width, rows, rows])
        else:
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            weights = tuple(_detached(p.weight) for p in projections)
            biases = tuple(_detached(p.bias) for p in projections)
        self.q_weight_QD, self.k_weight_KD, self.v_weight_KD = weights
        self.q_bias: Tensor | None
        self.k_bias: Tensor | None
        self.v_bias: Tensor | None
        self.q_bias, self.k_bias, self.v_bias = biases
        if self.q_weight_QD.shape[0] != width or width % head_dim or self.k_weight_KD.shape[0] % head_dim:
            raise ModelError(
                f"layer {layer}: {self.name} projects queries to {self.q_weight_QD.shape[0]} and reads {width} values back: "
                "it is not plain softmax attention (a gated one, say), and Limbeck does not convert it"
            )
        self.q_norm: Any = getattr(attention, "q_norm", None)
        self.k_norm: Any = getattr(attention, "k_norm", None)
        known = ("qkv_proj", "q_proj", "k_proj", "v_proj", output, "q_norm", "k_norm")
        strange = [name for name, _ in attention.named_parameters() if name.split(".")[0] not in known]
        if strange:
            raise ModelError(
                f"layer {layer}: {self.name} has parameters that Limbeck does not know ({', '.join(strange[:4])}); a "
                "mixer would lose them"
            )
        self.facts = self._facts(attention, config, head_dim)

    def _facts(self, attention: nn.Module, config: PreTrainedConfig, head_dim: int) -> AttentionFacts:
        norm_kind, norm_type, eps = self._norms(head_dim)
        return AttentionFacts(
            layer=self.layer,
            hidden_size=self.o_weight_DQ.shape[0],
            num_heads=self.q_weight_QD.shape[0] // head_dim,
            num_kv_heads=self.k_weight_KD.shape[0] // head_dim,
            head_dim=head_dim,
            q_bias=self.q_bias is not None,
            k_bias=self.k_bias is not None,
            v_bias=self.v_bias is not None,
            o_bias=self.o_bias is not None,
            qk_norm=norm_kind,
            norm_eps=eps if eps is not None else float(getattr(config, "rms_norm_eps", 1e-6)),
            scaling=float(getattr(attention, "scaling", head_dim**-0.5)),
            softcap=getattr(attention, "attn_logit_softcapping", None),
            sliding_window=_sliding_window(attention, config, self.layer),
            rope=bool(getattr(attention, "use_rope", True)),
            norm_type=norm_type,
            norm_shapes=((), ()) if norm_type is None else (tuple(self.q_norm.weight.shape), tuple(self.k_norm.weight.shape)),
            apply_rotary=_rotary_function(attention),
        )

    def _norms(self, head_dim: int) -> tuple[Literal["none", "head", "full"], type[nn.Module] | None, float | None]:
        norms = (self.q_norm, self.k_norm)
        if all(norm is None for norm in norms):
            return "none", None, None
        if any(getattr(norm, "weight", None) is None for norm in norms):
            raise ModelError(
                f"layer {self.layer}: {self.name} has a q/k norm without a weight, or only one of the two; Limbeck "
                "does not convert it"
            )
        eps = next(
            (float(getattr(self.q_norm, name)) for name in ("eps", "variance_epsilon") if hasattr(self.q_norm, name)), None
        )
        kind: Literal["head", "full"] = "head" if self.q_norm.weight.shape[-1] == head_dim else "full"
        # With a single query head both readings agree.
        if kind == "full" and self.q_norm.weight.shape != self.q_weight_QD.shape[:1]:
            raise ModelError(
                f"layer {self.layer}: {self.name} norms q over {tuple(self.q_norm.weight.shape)}, neither a head nor "
                "the whole width"
            )
        return kind, type(self.q_norm), eps


def _detached(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach()


def _sliding_window(attention: nn.Module, config: PreTrainedConfig, layer: int) -> int | None:
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _rotary_function(attention: nn.Module) -> Callable[..., Rotary] | None:
    function = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if function is None or list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return None
    return function


def attention_view(model: PreTrainedModel, layer: int) -> AttentionView:
    """The view of one layer of a model."""
    module = decoder_layers(model)[layer]
    return AttentionView(getattr(module, attention_slot(module)), model.config.get_text_config(decoder=True), layer)
