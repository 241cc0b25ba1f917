"""The operators on flash-linear-attention's kernels: our arguments in, theirs out, nothing computed here.

Read against fla-core 0.6.0 (github.com/fla-org/flash-linear-attention).  What differs, and how it is met:

=====================  =====================================================================================================
their convention       ours
=====================  =====================================================================================================
one dtype for q, k, v  q and k take the dtype of v, which is the output's; decays and write strengths stay fp32
documents              ``cu_seqlens`` over one row of B * T tokens; padding stays where it is, with gates that pass the state on
                       and outputs set to zero, so that a row's padding belongs to the document before it
states                 one for every document, fp32, ``[N, H, K, V]``: a row's state goes to its first document, and the state
                       after its last one comes back
``chunk_gsa``          writes are given (``1 - e^g``); the state is a pair, keys ``[N, H, K, M]`` and values ``[N, H, M, V]``
``chunk_dplr_...``     reads with ``a`` before the decay, the operator after it: ``a`` is multiplied by ``e^g``
=====================  =====================================================================================================

Layout ``[B, T, H, ...]``, natural logarithms of decays and the meaning of ``scale`` are the same.  DeltaNet is ``chunk_gated_delta_rule``
without decay (``chunk_delta_rule`` refuses fp32); Lightning and Mamba-2 are ``chunk_simple_gla``, HGRN2 is ``chunk_gla``.  PaTH stays on
torch: the kernel there rounds directions to fp16 and takes neither a cache, a window nor a soft-cap.

Shape legend: B rows, T tokens, H heads, K key width, V value width, M slots, N documents of all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from limbeck.ops.chunks import FLOOR
from limbeck.ops.packing import document_segments

Made = tuple[Tensor, Tensor]
States = tuple[Tensor, ...]


@dataclass(frozen=True)
class Kernel:
    """A function of theirs."""

    module: str
    function: str
    decay: str = "g"
    """Name of the log decays."""
    strengths: frozenset[str] = frozenset()
    """Other inputs that stay fp32."""
    idle: frozenset[str] = frozenset()
    """Inputs that are zero at padding, besides the decays: then nothing is written there."""
    paired: bool = False
    """Whether its state is a pair."""


GATED_DELTA = Kernel(
    "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", strengths=frozenset({"beta"}), idle=frozenset({"beta"})
)
KIMI = Kernel("fla.ops.kda", "chunk_kda", strengths=frozenset({"beta"}), idle=frozenset({"beta"}))
HEAD_DECAY = Kernel("fla.ops.simple_gla", "chunk_simple_gla", idle=frozenset({"k"}))
CHANNEL_DECAY = Kernel("fla.ops.gla", "chunk_gla", idle=frozenset({"k"}))
SLOTS = Kernel("fla.ops.gsa", "chunk_gsa", idle=frozenset({"s"}), paired=True)
GENERALISED = Kernel("fla.ops.generalized_delta_rule", "chunk_dplr_delta_rule", "gk", idle=frozenset({"k", "b"}))


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *,
    documents_BT: Tensor | None = None, initial_state_BHKV: Tensor | None = None, scale: float | None = None, chunk: int = 64,
) -> Made:  # fmt: skip
    """:func:`limbeck.ops.delta_rule.gated_delta_rule`; ``chunk``, here and below, is theirs to choose."""
    return _single(GATED_DELTA, {"q": q, "k": k, "v": v, "g": g, "beta": beta}, documents_BT, initial_state_BHKV, scale)


def kimi_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *,
    documents_BT: Tensor | None = None, initial_state_BHKV: Tensor | None = None, scale: float | None = None, chunk: int = 64,
) -> Made:  # fmt: skip
    """:func:`limbeck.ops.kda.kimi_delta_rule`."""
    return _single(KIMI, {"q": q, "k": k, "v": v, "g": g, "beta": beta}, documents_BT, initial_state_BHKV, scale)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *,
    documents_BT: Tensor | None = None, initial_state_BHKV: Tensor | None = None, scale: float | None = None, chunk: int = 64,
) -> Made:  # fmt: skip
    """:func:`limbeck.ops.linear_attention.linear_attention`."""
    kernel = CHANNEL_DECAY if g.ndim == k.ndim else HEAD_DECAY
    return _single(kernel, {"q": q, "k": k, "v": v, "g": g}, documents_BT, initial_state_BHKV, scale)


def gated_slot_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *,
    documents_BT: Tensor | None = None, initial_state: Tensor | None = None, scale: float | None = None, chunk: int = 64,
) -> Made:  # fmt: skip
    """:func:`limbeck.ops.gated_slots.gated_slot_attention`."""
    states: States = ()
    if initial_state is not None:
        keys_BHMK, values_BHMV = initial_state.split([k.shape[-1], v.shape[-1]], -1)
        states = (keys_BHMK.mT, values_BHMV)
    inputs = {"q": q, "k": k, "v": v, "s": -torch.expm1(g.float()), "g": g}
    o, (keys_BHKM, values_BHMV) = _run(SLOTS, inputs, documents_BT, states, scale)
    return o, torch.cat([keys_BHKM.mT, values_BHMV], -1)


def generalised_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor, *,
    documents_BT: Tensor | None = None, initial_state_BHKV: Tensor | None = None, scale: float | None = None, chunk: int = 64,
) -> Made:  # fmt: skip
    """:func:`limbeck.ops.rwkv7.generalised_delta_rule`."""
    inputs = {"q": q, "k": k, "v": v, "a": a.float() * g.float().exp(), "b": b, "gk": g}
    return _single(GENERALISED, inputs, documents_BT, initial_state_BHKV, scale)


OPERATORS: dict[str, Callable[..., Made]] = {
    made.__name__: made
    for made in (gated_delta_rule, kimi_delta_rule, linear_attention, gated_slot_attention, generalised_delta_rule)
}
"""By the name of the operator that they stand in for."""


def _single(
    kernel: Kernel, inputs: dict[str, Tensor], documents_BT: Tensor | None, state: Tensor | None, scale: float | None
) -> Made:
    """An operator whose state is one tensor."""
    o, (final,) = _run(kernel, inputs, documents_BT, () if state is None else (state,), scale)
    return o, final


def _run(
    kernel: Kernel, inputs: dict[str, Tensor], documents_BT: Tensor | None, states: States, scale: float | None
) -> tuple[Tensor, States]:
    """Outputs ``[B, T, H, V]`` in the dtype of v, and the final states in fp32."""
    v = inputs["v"]
    batch, num_tokens = v.shape[:2]
    packing = None if documents_BT is None else _packing(documents_BT)
    words: dict[str, Any] = {}
    with torch.autocast(v.device.type, enabled=False):
        for name, x in inputs.items():
            x = x.float() if name == kernel.decay or name in kernel.strengths else x.to(v.dtype)
            # A gate that is shut has g = -inf, and kernels subtract sums of them.
            x = x.clamp_min(FLOOR) if name == kernel.decay else x
            if packing is not None:
                if name == kernel.decay or name in kernel.idle:
                    x = torch.where(packing.real_BT.view(batch, num_tokens, *[1] * (x.ndim - 2)), x, 0)
                x = x.reshape(1, -1, *x.shape[2:])
            words[name] = x
        states = tuple(state.float() for state in states)
        if packing is not None:
            words["cu_seqlens"] = packing.bounds
            count = packing.bounds.shape[0] - 1
            states = tuple(x.new_zeros(count, *x.shape[1:]).index_copy(0, packing.first_B, x) for x in states)
        if states:
            words["initial_state"] = states if kernel.paired else states[0]
        call = getattr(import_module(kernel.module), kernel.function)
        o, final = call(**words, scale=inputs["k"].shape[-1] ** -0.5 if scale is None else scale, output_final_state=True)
        finals = tuple(final) if kernel.paired else (final,)
        if packing is not None:
            o = torch.where(packing.real_BT[..., None, None], o.view(batch, num_tokens, *o.shape[2:]), 0)
            finals = tuple(x[packing.last_B] for x in finals)
    return o.to(v.dtype), tuple(x.float() for x in finals)


class _Packing(NamedTuple):
    """Where the documents of packed rows stand when the rows are laid end to end."""

    real_BT: Tensor
    bounds: Tensor
    """``cu_seqlens``, int64 ``[N + 1]``."""
    first_B: Tensor
    """Number of each row's first document."""
    last_B: Tensor


_PACKINGS: Any = WeakTensorKeyDictionary()
"""All layers of a forward pass ask for the same batch's, and every answer waits for the device."""


def _packing(documents_BT: Tensor) -> _Packing:
    known = _PACKINGS.get(documents_BT)
    if known is not None and known[0] == documents_BT._version:
        found: _Packing = known[1]
        return found
    real_BT, segments_BT = document_segments(documents_BT)
    begins_BT = torch.nn.functional.pad(segments_BT[:, 1:] != segments_BT[:, :-1], (1, 0), value=True)
    starts = begins_BT.flatten().nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([begins_BT.numel()])])
    last_B = (segments_BT[:, -1] + 1).cumsum(0) - 1
    made = _Packing(real_BT, bounds, last_B - segments_BT[:, -1], last_B)
    if not documents_BT.is_inference():
        _PACKINGS[documents_BT] = documents_BT._version, made
    return made


def example(
    name: str, widths: tuple[int, ...], *, seed: int = 0, batch: int = 2, tokens: int = 160, heads: int = 2
) -> list[Tensor]:
    """Inputs of an operator in its own range, fp32 on the CPU, with the initial state last.

    ``widths`` are those of its four-dimensional inputs: K, K, V, and M or K of what follows.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def unit(width: int) -> Tensor:
        return torch.nn.functional.normalize(normal(batch, tokens, heads, width), dim=-1)

    key, value = widths[0], widths[2]
    q, k, v = unit(key), unit(key), normal(batch, tokens, heads, value)
    gates = [widths[3]] if len(widths) > 3 else []
    g = -0.1 * torch.nn.functional.softplus(normal(batch, tokens, heads, *gates))
    state = normal(batch, heads, key, value)
    if name in ("gated_delta_rule", "kimi_delta_rule"):
        return [q, k, v, g, normal(batch, tokens, heads).sigmoid(), state]
    if name == "gated_slot_attention":
        # Scores of about unit variance: the softmax then matters.
        return [q * key**0.5, k * key**0.5, v, g, normal(batch, heads, widths[3], key + value)]
    if name == "generalised_delta_rule":
        removal = unit(key)
        return [q, k, v, g, removal * torch.exp(-g), -removal * normal(batch, tokens, heads, key).sigmoid(), state]
    return [q, k, v, g, state]
