"""What a forward pass keeps for the backward pass, in bytes a token.

Coefficients are measured: bytes of distinct tensors that autograd saves in one more layer of transformers' models, as a linear function of
width D, MLP width F, query width Q, key/value width KV, heads H and the sequence T (its mask).  Fits are exact to 0.2 percent for dense
families and their attention, 2 percent for experts and mixers (torch's own form; fused kernels keep less).  Under bfloat16 the residual stream
and norms stay float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from limbeck.planner.architecture import Architecture, Layer

MIXERS: dict[str, tuple[float, float, float]] = {
    "gated_deltanet": (79, 779, 0), "deltanet": (79, 771, 0), "gla": (139, 206, 0), "kda": (151, 726, 0), "mamba2": (115, 771, 0), "lightning": (88, 503, 0),
    "hgrn": (139, 207, 0), "gsa": (105, 14952, 0), "rwkv7": (294, 1491, 28), "swa": (26, 0, 0), "path": (60, 1641, 0),
}  # fmt: skip
"""Bytes a token of each mixer in float32 by query width, by head (mostly the blocks of a chunk of 64) and by model width."""
KERNELS = 0.5
"""Share of a mixer's activations that fused kernels keep: they make the blocks of a chunk again (an estimate)."""


@dataclass(frozen=True)
class Pass:
    """How a pass over some tokens runs."""

    rows: int
    sequence: int
    precision: str
    mask: bool = True
    """Whether packed rows have a mask of every pair of positions (SDPA); FlashAttention has none."""
    kernels: bool = False
    streams: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of it."""
        return self.rows * self.sequence

    @property
    def half(self) -> bool:
        """Whether products are in bfloat16."""
        return self.precision == "bfloat16"

    @property
    def wide(self) -> float:
        """Of float32's bytes: 2 in float64."""
        return 2.0 if self.precision == "float64" else 1.0


def layer_bytes(model: Architecture, layer: Layer, run: Pass) -> float:
    """Bytes that one decoder layer keeps for a token."""
    half = run.half
    total = (26.0 if half else 24.0) * model.hidden * run.streams
    total += mixing_bytes(layer, run) + _feed_forward(model, layer, half)
    return total * run.wide


def mixing_bytes(layer: Layer, run: Pass) -> float:
    """Bytes of those that its attention, or what stands in its place, keeps for a token, before :attr:`Pass.wide` multiplies
    them."""
    half, a = run.half, layer.attention
    if layer.deltanet is not None:
        net = layer.deltanet
        return _scan("gated_deltanet", net.value_heads * net.value_dim, net.value_heads, 0, run)
    assert a is not None
    if layer.mixer is not None:
        return _scan(layer.mixer.kind, a.width, a.heads, a.hidden, run)
    total = (8.0 if half else 16.0) * a.width + 4.0 * a.heads
    if a.qk_norm != "none":
        total += (6.0 if half else 8.0) * (a.width + a.kv_width) + (6.0 if a.qk_norm == "head" else 1.0) * a.heads
    if a.gated:
        total += (10.0 if half else 20.0) * a.width
    if run.mask:
        total += (2.0 if half else 4.0) * run.sequence
    return total


def _scan(kind: str, width: int, heads: int, hidden: int, run: Pass) -> float:
    by_width, by_head, by_model = MIXERS.get(kind, MIXERS["gated_deltanet"])
    total = (by_width - (7 if run.half else 0)) * width + by_head * heads + (by_model + (5 if run.half else 0)) * hidden
    return total * (KERNELS if run.kernels and kind != "swa" else 1.0)


def _feed_forward(model: Architecture, layer: Layer, half: bool) -> float:
    if layer.experts is None:
        return (8.0 if half else 16.0) * layer.mlp
    e = layer.experts
    routed = e.chosen * ((5.5 if half else 12.0) * model.hidden + (8.0 if half else 16.0) * e.width) + 12.0 * e.number
    shared = (8.0 if half else 16.0) * e.shared + (2.0 if half else 4.0) * model.hidden if e.shared else 0.0
    return routed + shared


def kept_bytes(model: Architecture, run: Pass, recompute: bool) -> float:
    """Bytes of all layers for a token: everything, or with ``recompute`` each layer's input and one layer whole."""
    each = [layer_bytes(model, layer, run) for layer in model.layers]
    if not recompute:
        return sum(each)
    return len(each) * 4.0 * run.wide * model.hidden * run.streams + max(each)


def working_bytes(model: Architecture, run: Pass) -> float:
    """Bytes for a token that a pass without gradients holds at one time: the widest layer's inputs and outputs."""
    width = 2 if run.half else 4
    widest = max(_widest(layer, model.hidden) for layer in model.layers)
    return (2 * 4 * model.hidden + 3 * width * widest + (width * run.sequence if run.mask else 0)) * run.wide


def backward_bytes(model: Architecture, run: Pass) -> float:
    """Bytes for a token of one layer's gradients on the way back, beside what is kept."""
    width = 2 if run.half else 4
    return (3 * 4 * model.hidden + 2 * width * max(_widest(layer, model.hidden) for layer in model.layers)) * run.wide


def _widest(layer: Layer, hidden: int) -> int:
    e = layer.experts
    inner = max(layer.mlp, e.chosen * max(e.width, hidden) + e.shared if e else 0)
    a: Any = layer.attention
    return max(inner, 2 * a.width if a else layer.deltanet.channels if layer.deltanet else 0)
