"""A model as its config says it is: every parameter by the name and shape that transformers gives it, and what each layer computes.

Nothing is built: names and shapes follow from the config's numbers, family by family.  A family that is not known is counted like a
Llama with what its config says of heads, biases and experts, and is marked (``exact`` is False).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from limbeck.errors import ModelError

Kind = Literal[
    "embedding", "head", "norm", "attention", "linear_attention", "mixer", "mlp", "router", "experts", "shared_expert", "scale", "connection", "network"
]  # fmt: skip
"""What a parameter is for."""
MATMUL: tuple[Kind, ...] = ("head", "attention", "linear_attention", "mixer", "mlp", "router", "experts", "shared_expert")
"""Kinds whose matrices are multiplied with every token (experts: those that a token chooses)."""
DELTANETS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
"""Families with Gated DeltaNet layers and gated attention (Qwen3-Next, Qwen3.5)."""
HEAD_NORMED = ("qwen3", "qwen3_moe", "gemma3_text", *DELTANETS)
SANDWICHED = ("gemma2", "gemma3_text")
"""Families that norm what a sublayer gives, too."""
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma2", "gemma3_text", "phi3", "qwen3_moe", *DELTANETS)
"""Families that are counted exactly; a test compares each with transformers."""
TIED = ("gemma2", "gemma3_text")
"""Families whose head is the embedding unless their config says otherwise."""
WIDE_HEADS = {"qwen3": 128, "gemma2": 256, "gemma3_text": 256, **dict.fromkeys(DELTANETS, 256)}
"""Width of a head where a config does not say it and the family does not derive it from the model's width."""


@dataclass(frozen=True)
class Weight:
    """One parameter."""

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def count(self) -> int:
        """Numbers in it."""
        return prod(self.shape)


@dataclass(frozen=True)
class Attention:
    """Softmax attention of a layer: what a mixer in its place must know, and what its cache holds."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    q_bias: bool = False
    kv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    window: int | None = None
    gated: bool = False
    """The query projection also makes an output gate (Qwen3-Next)."""

    @property
    def width(self) -> int:
        """Numbers of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Numbers of all key (or value) heads."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class DeltaNet:
    """A family's own Gated DeltaNet layer."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    @property
    def channels(self) -> int:
        """Width of the short convolution over q, k and v."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True)
class Experts:
    """A layer's routed experts."""

    number: int
    chosen: int
    """Of them, for a token."""
    width: int
    shared: int = 0
    """Width of the expert that every token goes through; 0 without one."""


@dataclass(frozen=True)
class Layer:
    """What one decoder layer does."""

    index: int
    attention: Attention | None
    deltanet: DeltaNet | None = None
    experts: Experts | None = None
    mlp: int = 0
    """Width of a dense MLP; 0 where experts stand."""
    mixer: Any = None
    """Options of a mixer of ours in the place of ``attention``."""


@dataclass(frozen=True)
class Architecture:
    """A model without weights."""

    name: str
    family: str
    vocabulary: int
    hidden: int
    layers: tuple[Layer, ...]
    weights: tuple[Weight, ...]
    context: int
    """Tokens of a sequence at most."""
    tied: bool
    exact: bool = True

    @property
    def total(self) -> int:
        """Parameters, a tied head once."""
        return sum(weight.count for weight in self.weights)

    @property
    def active(self) -> int:
        """Parameters that one token meets: of the routed experts only those it chooses (embedding and head included)."""
        shares = {layer.index: layer.experts.chosen / layer.experts.number for layer in self.layers if layer.experts}
        return round(sum(w.count * (shares[layer_of(w.name)] if w.kind == "experts" else 1) for w in self.weights))

    @property
    def head(self) -> int:
        """Numbers of the output projection, tied or not."""
        return self.vocabulary * self.hidden

    def of(self, *kinds: Kind) -> int:
        """Parameters of these kinds."""
        return sum(w.count for w in self.weights if w.kind in kinds)


def layer_of(name: str) -> int:
    """Number of the decoder layer that a parameter is in; -1 outside them."""
    words = name.split(".")
    return int(words[words.index("layers") + 1]) if "layers" in words else -1


class _Config:
    """A ``config.json``: its text part, with errors that name what is missing."""

    def __init__(self, values: Mapping[str, Any], name: str):
        inner = values.get("text_config")
        # A checkpoint that also sees keeps its language model in a part of its own; families that take pictures are known by that part.
        self.values = {**values, **inner} if isinstance(inner, Mapping) else dict(values)
        self.name = name

    def number(self, *names: str, default: int | None = None) -> int:
        """The first of these fields that is there."""
        for field in names:
            value = self.values.get(field)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 10**9:
                    raise ModelError(
                        f"{self.name}: config field `{field}` is {value!r:.60}, and a whole number is needed: put the original config.json back"
                    )
                return value
        if default is None:
            raise ModelError(
                f"{self.name}: its config has no `{names[0]}`, without which nothing can be counted: give the config.json of a decoder-only "
                "language model (limbeck plan --config NAME=FILE)"
            )
        return default

    def flag(self, name: str, default: bool = False) -> bool:
        """A field that is true or false."""
        value = self.values.get(name)
        return default if value is None else bool(value)

    def get(self, name: str) -> Any:
        """A field as it is, or None."""
        return self.values.get(name)


def read_architecture(values: Mapping[str, Any], name: str) -> Architecture:
    """The model of a config; :class:`ModelError` names the field that is missing or makes no sense."""
    config = _Config(values, name)
    family = str(config.get("model_type") or "")
    if family == "limbeck" and isinstance(section := config.get("limbeck"), Mapping):
        family = str((section.get("base") or {}).get("model_type") or "")
    if not family:
        raise ModelError(f"{name}: its config has no `model_type`: give the config.json of a decoder-only language model")
    if config.flag("is_encoder_decoder"):
        raise ModelError(f"{name}: '{family}' is an encoder-decoder: Limbeck plans decoder-only causal language models")
    if config.get("kv_lora_rank"):
        raise ModelError(f"{name}: '{family}' has multi-head latent attention, which the planner cannot count: plan another base")
    count, hidden, vocabulary = config.number("num_hidden_layers"), config.number("hidden_size"), config.number("vocab_size")
    layers = tuple(_layer(config, family, index) for index in range(count))
    tied = config.flag("tie_word_embeddings", family in TIED)
    weights = [Weight("model.embed_tokens.weight", (vocabulary, hidden), "embedding")]
    for layer in layers:
        weights += layer_weights(layer, family, hidden, mlp_bias=config.flag("mlp_bias"))
    weights.append(Weight("model.norm.weight", (hidden,), "norm"))
    if not tied:
        weights.append(Weight("lm_head.weight", (vocabulary, hidden), "head"))
    context = config.number("max_position_embeddings", default=4096)
    return Architecture(name, family, vocabulary, hidden, layers, tuple(weights), context, tied, exact=family in KNOWN)


def _layer(config: _Config, family: str, index: int) -> Layer:
    kinds = config.get("layer_types")
    kind = kinds[index] if isinstance(kinds, Sequence) and len(kinds) > index else _default_kind(config, family, index)
    experts = _experts(config, family, index)
    mlp = 0 if experts else config.number("intermediate_size")
    if kind == "linear_attention":
        deltanet = DeltaNet(
            config.number("linear_num_key_heads"),
            config.number("linear_num_value_heads"),
            config.number("linear_key_head_dim"),
            config.number("linear_value_head_dim"),
            config.number("linear_conv_kernel_dim", default=4),
        )
        return Layer(index, None, deltanet, experts, mlp)
    return Layer(index, _attention(config, family, kind), None, experts, mlp)


def _default_kind(config: _Config, family: str, index: int) -> str:
    if family in DELTANETS:
        # Three layers of DeltaNet, one of gated attention.
        return "full_attention" if (index + 1) % config.number("full_attention_interval", default=4) == 0 else "linear_attention"
    if family == "gemma2":
        return "sliding_attention" if index % 2 == 0 else "full_attention"
    if family == "gemma3_text":
        return "full_attention" if (index + 1) % config.number("sliding_window_pattern", default=6) == 0 else "sliding_attention"
    # Every layer of Mistral and Phi-3 has the window, if there is one.
    return "sliding_attention" if family in ("mistral", "phi3") else "full_attention"


def _attention(config: _Config, family: str, kind: str) -> Attention:
    hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
    # Only where the config is silent: most families derive it, a few have a width of their own.
    head_dim = config.number("head_dim", default=WIDE_HEADS.get(family, hidden // max(heads, 1)))
    kv_heads = config.number("num_key_value_heads", default=heads)
    if not heads or not kv_heads or heads % kv_heads:
        raise ModelError(f"{config.name}: {heads} attention heads cannot share {kv_heads} key/value heads: put the original config.json back")
    bias = config.flag("attention_bias", family == "qwen2")
    window = config.number("sliding_window", default=0) if kind == "sliding_attention" else 0
    return Attention(
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        q_bias=bias,
        kv_bias=bias,
        # Qwen2 has biases on q, k and v alone.
        o_bias=bias and family != "qwen2",
        qk_norm="full" if family == "olmo2" else "head" if family in HEAD_NORMED else "none",
        window=window or None,
        gated=family in DELTANETS,
    )


def _experts(config: _Config, family: str, index: int) -> Experts | None:
    number = config.number("num_experts", "num_local_experts", "n_routed_experts", default=0)
    if not number or family in ("qwen3_5_text",):
        return None
    step = config.number("decoder_sparse_step", default=1)
    dense = config.get("mlp_only_layers") or ()
    if family == "qwen3_moe" and (index in dense or (index + 1) % max(step, 1)):
        return None
    shared = config.number("shared_expert_intermediate_size", default=0) if family in DELTANETS else 0
    width = config.number("moe_intermediate_size", "intermediate_size")
    return Experts(number, config.number("num_experts_per_tok"), width, shared)


# -- names and shapes -----------------------------------------------------------------------------------------------------


def layer_weights(layer: Layer, family: str, hidden: int, mlp_bias: bool = False) -> list[Weight]:
    """Parameters of one decoder layer of a family."""
    at = f"model.layers.{layer.index}"
    found = list(attention_weights(f"{at}.self_attn", layer.attention, family)) if layer.attention else []
    if layer.deltanet is not None:
        found += _deltanet_weights(f"{at}.linear_attn", layer.deltanet, family, hidden)
    if layer.experts is not None:
        found += _expert_weights(f"{at}.mlp", layer.experts, hidden)
    else:
        found += _mlp_weights(f"{at}.mlp", family, hidden, layer.mlp, "mlp", mlp_bias)
    names = ["input_layernorm", "post_attention_layernorm"]
    if family == "olmo2":
        names = ["post_attention_layernorm", "post_feedforward_layernorm"]
    elif family in SANDWICHED:
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    return [*found, *(Weight(f"{at}.{name}.weight", (hidden,), "norm") for name in names)]


def attention_weights(at: str, attention: Attention, family: str) -> Iterator[Weight]:
    """Parameters of softmax attention."""
    hidden, width, kv_width = attention.hidden, attention.width, attention.kv_width
    if family == "phi3":
        yield Weight(f"{at}.qkv_proj.weight", (width + 2 * kv_width, hidden), "attention")
    else:
        # Beside each head's query stands its gate, where there is one.
        yield from linear(f"{at}.q_proj", hidden, width * (1 + attention.gated), attention.q_bias)
        yield from linear(f"{at}.k_proj", hidden, kv_width, attention.kv_bias)
        yield from linear(f"{at}.v_proj", hidden, kv_width, attention.kv_bias)
    yield from linear(f"{at}.o_proj", width, hidden, attention.o_bias)
    yield from norms(at, attention)


def norms(at: str, attention: Attention, kv_heads: int | None = None) -> Iterator[Weight]:
    """The q and k norms of attention, the key's over ``kv_heads`` heads if given."""
    if attention.qk_norm == "none":
        return
    full = attention.qk_norm == "full"
    yield Weight(f"{at}.q_norm.weight", (attention.width if full else attention.head_dim,), "norm")
    keys = (kv_heads or attention.kv_heads) * attention.head_dim
    yield Weight(f"{at}.k_norm.weight", (keys if full else attention.head_dim,), "norm")


def linear(at: str, inputs: int, outputs: int, bias: bool = False, kind: Kind = "attention") -> Iterator[Weight]:
    """A Linear."""
    yield Weight(f"{at}.weight", (outputs, inputs), kind)
    if bias:
        yield Weight(f"{at}.bias", (outputs,), kind)


def _mlp_weights(at: str, family: str, hidden: int, width: int, kind: Kind, bias: bool = False) -> Iterator[Weight]:
    if family == "phi3":
        yield from linear(f"{at}.gate_up_proj", hidden, 2 * width, kind=kind)
    else:
        yield from linear(f"{at}.gate_proj", hidden, width, bias, kind)
        yield from linear(f"{at}.up_proj", hidden, width, bias, kind)
    yield from linear(f"{at}.down_proj", width, hidden, bias, kind)


def _expert_weights(at: str, experts: Experts, hidden: int) -> Iterator[Weight]:
    """Stacked experts ``[E, out, in]``, as transformers keeps them, their router, and the shared expert."""
    yield Weight(f"{at}.gate.weight", (experts.number, hidden), "router")
    yield Weight(f"{at}.experts.gate_up_proj", (experts.number, 2 * experts.width, hidden), "experts")
    yield Weight(f"{at}.experts.down_proj", (experts.number, hidden, experts.width), "experts")
    if experts.shared:
        yield from _mlp_weights(f"{at}.shared_expert", "", hidden, experts.shared, "shared_expert")
        yield Weight(f"{at}.shared_expert_gate.weight", (1, hidden), "shared_expert")


def _deltanet_weights(at: str, net: DeltaNet, family: str, hidden: int) -> Iterator[Weight]:
    keys, values = net.key_heads * net.key_dim, net.value_heads * net.value_dim
    yield Weight(f"{at}.dt_bias", (net.value_heads,), "linear_attention")
    yield Weight(f"{at}.A_log", (net.value_heads,), "linear_attention")
    yield Weight(f"{at}.conv1d.weight", (net.channels, 1, net.kernel), "linear_attention")
    if family == "qwen3_next":
        yield from linear(f"{at}.in_proj_qkvz", hidden, 2 * keys + 2 * values, kind="linear_attention")
        yield from linear(f"{at}.in_proj_ba", hidden, 2 * net.value_heads, kind="linear_attention")
    else:
        yield from linear(f"{at}.in_proj_qkv", hidden, 2 * keys + values, kind="linear_attention")
        yield from linear(f"{at}.in_proj_z", hidden, values, kind="linear_attention")
        yield from linear(f"{at}.in_proj_b", hidden, net.value_heads, kind="linear_attention")
        yield from linear(f"{at}.in_proj_a", hidden, net.value_heads, kind="linear_attention")
    yield Weight(f"{at}.norm.weight", (net.value_dim,), "norm")
    yield from linear(f"{at}.out_proj", values, hidden, kind="linear_attention")
