"""Options of the mixers: what replaces softmax attention in a hybrid's layers."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, model_validator

from limbeck.config.base import Part
from limbeck.errors import did_you_mean
from limbeck.registry import Registry

MIXERS = Registry("mixer")

Range = tuple[PositiveFloat, PositiveFloat]
"""Lowest and highest, in this order."""
HalfRate = Annotated[float, Field(gt=0, lt=0.5)]
SlowRate = Annotated[float, Field(gt=0, lt=0.6)]

_SEED: dict[str, Any] = {"rope": False, "qk_norm": "l2", "keep_qk_norm": False, "beta": "learned", "gate_bias": False}
GATED_DELTANET_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # Qwen3.5's own layer: convolution and SiLU on q, k and v, gated norm, no RoPE.
    "native": {
        "short_conv": 4, "activation": "silu", "activate_v": True, "output_gate": True, "output_norm": True,
        "rope": False, "keep_qk_norm": False, "gate_bias": False,
    },
    "gdn_v1": {**_SEED, "short_conv": 4, "activation": "silu", "activate_v": False, "output_gate": False, "output_norm": True},
    "gdn_v2": {**_SEED, "short_conv": 0, "activation": "silu", "activate_v": False, "output_gate": False, "output_norm": True},
    "gdn_v3": {**_SEED, "short_conv": 4, "activation": "silu", "activate_v": False, "output_gate": True, "output_norm": True},
    "gdn_v4": {**_SEED, "short_conv": 0, "activation": "silu", "activate_v": False, "output_gate": True, "output_norm": True},
    "gdn_v5": {
        **_SEED, "short_conv": 0, "activation": "silu", "activate_v": False, "output_gate": True, "output_norm": True,
        "deep_kv": True,
    },
    "gdn_v6": {**_SEED, "short_conv": 0, "activation": "none", "output_gate": False, "output_norm": False},
}  # fmt: skip
"""The seed's variants without their defects: heads are expanded as heads, biases survive, v keeps its sign, and the second
linear of v5 starts as the identity."""


class ReadOutOptions(Part):
    """What mixers with a matrix state a head share, however q, k and v are made."""

    rope: bool = True
    """Rotate the linear q and k with the family's own rotary embedding."""
    qk_norm: Literal["l2", "none"] = "l2"
    """Normalise q and k per head inside the kernel.  Without it a delta rule is unstable unless keys are short."""
    keep_qk_norm: bool = True
    """Carry the teacher's own q/k norms (Qwen3, OLMo2), where it has them, before the rotation."""
    output_gate: bool = True
    """Multiply the output by a learned SiLU gate of the layer's input, before the output projection."""
    gate_bias: bool = True
    """Give the gate a bias, so that it starts open everywhere.  Without one it starts random."""
    output_norm: bool = False
    """RMS-normalise each head's output before the gate.  Off by default: a read of unit keys has the scale of the values already, and
    the copied projections then start much nearer to the attention's output."""
    chunk: int = Field(64, ge=8, le=256)
    """Tokens a chunk of the parallel form."""


class MatrixStateOptions(ReadOutOptions):
    """What mixers with a matrix state over convolved projections share."""

    short_conv: int = Field(0, ge=0, le=16)
    """Kernel size of the causal depthwise convolution on q, k and v; 0 for none."""
    activation: Literal["none", "silu"] = "none"
    """Applied to q and k (after the convolution)."""
    activate_v: bool = False
    """Also apply the activation to v.  A copied value projection then cannot emit negative values: only for `native`."""


class DeltaRuleOptions(MatrixStateOptions):
    """What mixers with a delta rule share."""

    beta: Literal["learned", "one"] = "learned"
    """Write strength: a sigmoid of the input, or always 1."""
    deep_kv: bool = False
    """A second linear after k and v, initialised as the identity (the seed's gdn_v5)."""


@MIXERS.register("limbeck.students.mixers.gated_deltanet:GatedDeltaNet")
class GatedDeltaNetOptions(DeltaRuleOptions):
    """Gated DeltaNet (arXiv 2412.06464): a matrix state with per-head decay and the delta rule."""

    kind: Literal["gated_deltanet"] = "gated_deltanet"
    preset: str = "default"
    """A named set of the options below; options given beside it win."""
    decay: Literal["learned", "none"] = "learned"
    """Forget gate: learned per head and token, or none (plain DeltaNet)."""
    decay_init: Range = (0.003, 0.3)
    """Range of the step size that sets the initial forget rates; log-uniform over heads (a head forgets about A * dt a token)."""

    Presets: ClassVar = GATED_DELTANET_PRESETS

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("preset"), str):
            name = value["preset"]
            if name not in cls.Presets:
                hint = did_you_mean(name, cls.Presets) or ";"
                raise ValueError(f"preset: unknown preset {name!r}{hint} allowed: {', '.join(cls.Presets)}")
            return {**cls.Presets[name], **value}
        return value


@MIXERS.register("limbeck.students.mixers.deltanet:DeltaNet")
class DeltaNetOptions(DeltaRuleOptions):
    """DeltaNet (arXiv 2406.06484): the delta rule that forgets nothing but what it overwrites."""

    kind: Literal["deltanet"] = "deltanet"


@MIXERS.register("limbeck.students.mixers.kda:KimiDeltaAttention")
class KimiDeltaAttentionOptions(DeltaRuleOptions):
    """Kimi Delta Attention (arXiv 2510.26692): the delta rule with a decay for every key channel."""

    kind: Literal["kda"] = "kda"
    decay_rank: int = Field(16, ge=1)
    """Width between the two linears that make the decays of the layer's input."""
    decay_init: Range = (0.003, 0.3)
    """Range of the initial forget rates a token; log-uniform over heads, the same in all channels of one."""


@MIXERS.register("limbeck.students.mixers.gla:GatedLinearAttention")
class GatedLinearAttentionOptions(MatrixStateOptions):
    """Gated linear attention (arXiv 2312.06635): a matrix state with a decay for every key channel, nothing is overwritten."""

    kind: Literal["gla"] = "gla"
    decay_rank: int = Field(16, ge=1)
    """Width between the two linears that make the decays of the layer's input."""
    decay_temperature: float = Field(16.0, gt=0)
    """What the log-sigmoid of the decays is divided by: the larger, the slower the memory forgets."""
    decay_init: Range = (0.003, 0.3)
    """Range of the initial forget rates a token; log-uniform over heads, the same in all channels of one."""


@MIXERS.register("limbeck.students.mixers.lightning:LightningAttention")
class LightningAttentionOptions(MatrixStateOptions):
    """Lightning attention (arXiv 2401.04658): a matrix state with a fixed decay for every head."""

    kind: Literal["lightning"] = "lightning"
    slopes: Range = (0.003, 0.3)
    """Range of the fixed forget rates a token; log-uniform over heads, as ALiBi's slopes are."""


@MIXERS.register("limbeck.students.mixers.mamba2:Mamba2")
class Mamba2Options(MatrixStateOptions):
    """Mamba-2 (arXiv 2405.21060): a matrix state with a decay a head and token, writes scaled by the same step, and a skip."""

    kind: Literal["mamba2"] = "mamba2"
    step_init: Range = (0.003, 0.3)
    """Range of the initial step sizes, which are the forget rates a token at the start; log-uniform over heads."""


@MIXERS.register("limbeck.students.mixers.hgrn:Hgrn2")
class Hgrn2Options(MatrixStateOptions):
    """HGRN2 (arXiv 2404.07904): a matrix state with lower-bounded forget gates, whose complements are the keys."""

    kind: Literal["hgrn"] = "hgrn"
    rope: bool = False
    """Rotate queries and the gates' logits with the family's own rotary embedding: gates then swing with the position."""
    decay_init: tuple[HalfRate, HalfRate] = (0.003, 0.3)
    """Range of the initial forget rates of a half-open gate; log-uniform over heads.  The lower bound forgets twice as fast."""


@MIXERS.register("limbeck.students.mixers.gsa:GatedSlotAttention")
class GatedSlotAttentionOptions(MatrixStateOptions):
    """Gated slot attention (arXiv 2409.07146): a softmax over a fixed number of slots that forget."""

    kind: Literal["gsa"] = "gsa"
    slots: int = Field(64, ge=1)
    """Keys and values a head."""
    decay_temperature: float = Field(8.0, gt=0)
    """What the log-sigmoid of the decays is divided by: the larger, the slower the slots forget."""
    decay_init: Range = (0.003, 0.3)
    """Range of the initial forget rates a token; log-uniform over the slots of a head."""


@MIXERS.register("limbeck.students.mixers.path:PathAttention")
class PathOptions(Part):
    """PaTH (arXiv 2505.16381): softmax attention with data-dependent positions; keeps a KV-sized cache."""

    kind: Literal["path"] = "path"
    rope: bool = True
    """Keep the family's rotary embedding under the paths: the mixer then starts as nearly the attention.  The paper has none."""
    path_rank: int = Field(32, ge=1)
    """Width between the two linears that make the paths' directions of the layer's input."""
    short_conv: int = Field(3, ge=0, le=16)
    """Kernel size of the causal depthwise convolution on the directions; 0 for none."""
    beta_init: float = Field(0.02, gt=0, lt=2)
    """Strength of a step of the path at the start: 0 is none, 1 projects, 2 reflects."""
    chunk: int = Field(64, ge=8, le=256)
    """Tokens a block of the parallel form."""


@MIXERS.register("limbeck.students.mixers.rwkv7:Rwkv7")
class Rwkv7Options(ReadOutOptions):
    """RWKV-7 (arXiv 2503.14456): a decay for every channel, a removal key beside the key, and the first layer's values in all layers."""

    kind: Literal["rwkv7"] = "rwkv7"
    token_shift: bool = True
    """Let every projection see a learned share of the token before."""
    rank: int = Field(32, ge=1)
    """Width between the two linears that make decays, strengths and the mix with the first layer's values."""
    decay_init: tuple[SlowRate, SlowRate] = (0.003, 0.3)
    """Range of the initial forget rates a token; log-uniform over heads, the same in all channels of one."""

    short_conv: ClassVar[int] = 0
    """The token shift is RWKV-7's convolution."""


@MIXERS.register("limbeck.students.mixers.sliding_window:SlidingWindow")
class SlidingWindowOptions(Part):
    """Softmax attention over a window and a few sink tokens: the honest baseline of every linear mixer."""

    kind: Literal["swa"] = "swa"
    window: int = Field(128, ge=1)
    """Tokens a position sees, itself included."""
    sinks: int = Field(4, ge=0)
    """First tokens of the document that stay visible."""
