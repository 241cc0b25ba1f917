"""What stands in a hybrid's layer in the place of softmax attention: parameters, state and operations, by the mixer's options alone.

Names and shapes are those of ``limbeck.students.mixers``; a test compares them with the modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from limbeck.planner.architecture import Attention, Weight, linear, norms

STATE_BYTES = 4
"""A matrix state is fp32 whatever the model computes in."""
POSITION_BYTES = 4
_GROUPED = ("swa", "path")
"""Mixers that keep grouped key/value heads."""
OPERATIONS = {"gated_deltanet": 7, "deltanet": 7, "kda": 7, "rwkv7": 9}
"""Floating-point operations a state entry and token, 5 where nothing is said."""


def mixer_weights(at: str, mixer: Any, attention: Attention, layer: int) -> list[Weight]:
    """Parameters of a mixer.  One of a plug-in is counted as the four projections with one key/value head a query head."""
    return list(_grouped(at, mixer, attention) if mixer.kind in _GROUPED else _matrix(at, mixer, attention, layer))


def _vector(name: str, *shape: int) -> Weight:
    return Weight(name, shape, "mixer")


def _grouped(at: str, mixer: Any, a: Attention) -> Iterator[Weight]:
    yield from linear(f"{at}.q_proj", a.hidden, a.width, a.q_bias, "mixer")
    yield from linear(f"{at}.k_proj", a.hidden, a.kv_width, a.kv_bias, "mixer")
    yield from linear(f"{at}.v_proj", a.hidden, a.kv_width, a.kv_bias, "mixer")
    yield from linear(f"{at}.o_proj", a.width, a.hidden, a.o_bias, "mixer")
    yield from norms(at, a)
    if mixer.kind == "path":
        yield from linear(f"{at}.w_down", a.hidden, mixer.path_rank, kind="mixer")
        yield from linear(f"{at}.w_up", mixer.path_rank, a.kv_width, kind="mixer")
        if mixer.short_conv:
            yield _vector(f"{at}.w_conv", a.kv_width, mixer.short_conv)
        yield from linear(f"{at}.b_proj", a.hidden, a.kv_heads, True, "mixer")


def _matrix(at: str, mixer: Any, a: Attention, layer: int) -> Iterator[Weight]:
    width = a.width
    yield from linear(f"{at}.q_proj", a.hidden, width, a.q_bias, "mixer")
    yield from linear(f"{at}.k_proj", a.hidden, width, a.kv_bias, "mixer")
    yield from linear(f"{at}.v_proj", a.hidden, width, a.kv_bias, "mixer")
    yield from linear(f"{at}.o_proj", width, a.hidden, a.o_bias, "mixer")
    if getattr(mixer, "keep_qk_norm", False) and a.qk_norm != "none":
        # Both have the shape of the query's: keys are expanded to as many heads.
        yield from norms(at, a, kv_heads=a.heads)
    if getattr(mixer, "short_conv", 0):
        yield from (_vector(f"{at}.{name}_conv", width, mixer.short_conv) for name in "qkv")
    yield from _gates(at, mixer, a, layer)
    if getattr(mixer, "output_gate", False):
        yield from linear(f"{at}.g_proj", a.hidden, width, mixer.gate_bias, "mixer")
    if getattr(mixer, "output_norm", False):
        yield _vector(f"{at}.o_norm", width)


def _gates(at: str, mixer: Any, a: Attention, layer: int) -> Iterator[Weight]:
    kind, width, heads = mixer.kind, a.width, a.heads
    if kind in ("gated_deltanet", "deltanet", "kda"):
        if mixer.deep_kv:
            yield from (w for name in ("k_deep", "v_deep") for w in linear(f"{at}.{name}", width, width, True, "mixer"))
        if kind == "gated_deltanet" and mixer.decay == "learned":
            yield from linear(f"{at}.a_proj", a.hidden, heads, kind="mixer")
            yield from (_vector(f"{at}.{name}", heads) for name in ("A_log", "dt_bias"))
        if kind == "kda":
            yield from linear(f"{at}.a_down", a.hidden, mixer.decay_rank, kind="mixer")
            yield from linear(f"{at}.a_up", mixer.decay_rank, width, kind="mixer")
            yield from (_vector(f"{at}.A_log", heads), _vector(f"{at}.dt_bias", width))
        if mixer.beta == "learned":
            yield from linear(f"{at}.b_proj", a.hidden, heads, kind="mixer")
    elif kind in ("gla", "lightning"):
        if not mixer.output_norm:
            yield _vector(f"{at}.read_scale", heads)
        if kind == "gla":
            yield from linear(f"{at}.a_down", a.hidden, mixer.decay_rank, kind="mixer")
            yield from linear(f"{at}.a_up", mixer.decay_rank, width, True, "mixer")
    elif kind == "mamba2":
        yield from linear(f"{at}.dt_proj", a.hidden, heads, kind="mixer")
        yield from (_vector(f"{at}.{name}", heads) for name in ("dt_bias", "A_log", "D"))
    elif kind == "hgrn":
        yield _vector(f"{at}.span_logit", heads)
    elif kind == "gsa":
        yield from linear(f"{at}.f_proj", a.hidden, heads * mixer.slots, True, "mixer")
    elif kind == "rwkv7":
        if mixer.token_shift:
            yield _vector(f"{at}.shift", 6, a.hidden)
        # The very first layer of a model has no values before its own.
        for name in ("w", "a", "v") if layer else ("w", "a"):
            yield from linear(f"{at}.{name}_down", a.hidden, mixer.rank, kind="mixer")
            yield from linear(f"{at}.{name}_up", mixer.rank, width, True, "mixer")
        yield from (_vector(f"{at}.{name}", width) for name in ("kappa", "alpha", "rho"))


def mixer_state(mixer: Any, a: Attention, context: int, width: int = 2) -> tuple[int, int]:
    """``(bytes that grow with a token, bytes that a sequence has anyway)`` after ``context`` tokens, ``width`` bytes a cached number."""
    if mixer.kind == "swa":
        window = min(mixer.window, a.window or mixer.window) - 1 + mixer.sinks
        return 0, min(context, window) * (2 * a.kv_width * width + POSITION_BYTES)
    if mixer.kind == "path":
        return a.kv_width * (STATE_BYTES + width) + POSITION_BYTES, a.kv_width * max(mixer.short_conv - 1, 0) * width
    rows = 2 * mixer.slots if mixer.kind == "gsa" else a.head_dim
    state = a.width * rows * STATE_BYTES + 3 * a.width * max(getattr(mixer, "short_conv", 0) - 1, 0) * width
    return 0, state + (a.hidden * width if getattr(mixer, "token_shift", False) else 0)


def mixer_flops(mixer: Any, a: Attention, context: float) -> float:
    """Operations of the recurrence for one forward token, beside the projections' (a multiply-add is two)."""
    if mixer.kind == "swa":
        return 4 * a.width * min(context, mixer.window)
    if mixer.kind == "path":
        return 4 * (a.width + a.kv_width) * context
    rows = 2 * mixer.slots if mixer.kind == "gsa" else a.head_dim
    return OPERATIONS.get(mixer.kind, 5) * a.width * rows
