"""Options of the mixers: what replaces softmax attention in a hybrid's layers."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from limbeck.config.base import Part
from limbeck.errors import did_you_mean
from limbeck.registry import Registry

MIXERS = Registry("mixer")

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


@MIXERS.register("limbeck.students.mixers.gated_deltanet:GatedDeltaNet")
class GatedDeltaNetOptions(Part):
    """Gated DeltaNet (arXiv 2412.06464): a matrix state with per-head decay and the delta rule."""

    kind: Literal["gated_deltanet"] = "gated_deltanet"
    preset: str = "default"
    """A named set of the options below; options given beside it win."""
    short_conv: int = Field(0, ge=0, le=16)
    """Kernel size of the causal depthwise convolution on q, k and v; 0 for none."""
    activation: Literal["none", "silu"] = "none"
    """Applied to q and k (after the convolution)."""
    activate_v: bool = False
    """Also apply the activation to v.  A copied value projection then cannot emit negative values: only for `native`."""
    rope: bool = True
    """Rotate the linear q and k with the family's own rotary embedding."""
    qk_norm: Literal["l2", "none"] = "l2"
    """Normalise q and k per head inside the kernel.  Without it the delta rule is unstable unless keys are short."""
    keep_qk_norm: bool = True
    """Carry the teacher's own q/k norms (Qwen3, OLMo2), where it has them, before the rotation."""
    output_gate: bool = True
    """Multiply the output by a learned SiLU gate of the layer's input, before the output projection."""
    gate_bias: bool = True
    """Give the gate a bias, so that it starts open everywhere.  Without one it starts random."""
    output_norm: bool = False
    """RMS-normalise each head's output before the gate.  Off by default: a read of unit keys has the scale of the values already, and
    the copied projections then start much nearer to the attention's output."""
    beta: Literal["learned", "one"] = "learned"
    """Write strength: a sigmoid of the input, or always 1."""
    decay: Literal["learned", "none"] = "learned"
    """Forget gate: learned per head and token, or none (plain DeltaNet)."""
    decay_init: tuple[float, float] = (0.003, 0.3)
    """Range of the step size that sets the initial forget rates; log-uniform over heads (a head forgets about A * dt a token)."""
    deep_kv: bool = False
    """A second linear after k and v, initialised as the identity (the seed's gdn_v5)."""
    chunk: int = Field(64, ge=8, le=256)
    """Tokens a chunk of the parallel form."""

    Presets: ClassVar = GATED_DELTANET_PRESETS

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("preset"), str):
            name = value["preset"]
            if name not in GATED_DELTANET_PRESETS:
                hint = did_you_mean(name, GATED_DELTANET_PRESETS) or ";"
                raise ValueError(f"preset: unknown preset {name!r}{hint} allowed: {', '.join(GATED_DELTANET_PRESETS)}")
            return {**GATED_DELTANET_PRESETS[name], **value}
        return value


@MIXERS.register("limbeck.students.mixers.sliding_window:SlidingWindow")
class SlidingWindowOptions(Part):
    """Softmax attention over a window and a few sink tokens: the honest baseline of every linear mixer."""

    kind: Literal["swa"] = "swa"
    window: int = Field(128, ge=1)
    """Tokens a position sees, itself included."""
    sinks: int = Field(4, ge=0)
    """First tokens of the document that stay visible."""
