"""A flash-linear-attention made of loops: its functions' signatures, checks and conventions (fla-core 0.6.0), computed token by token in fp64.

It stands in ``sys.modules`` for the package, which needs triton and a GPU.  What it says of the real functions' arguments is from their
source; what it computes is their documented recurrence.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

VERSION = "0.6.0"


@dataclass
class Stub:
    """The calls made, and what is wrong with the package (nothing, at first)."""

    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    defect: str = ""

    @property
    def functions(self) -> list[str]:
        """Names of the functions called, in order."""
        return [name for name, _ in self.calls]


def _documents(
    step: Callable[..., tuple[Tensor, Any]], inputs: list[Tensor], states: list[Tensor], cu_seqlens: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """``step(*inputs at t, *states) -> (output, states)`` over rows, or over the documents of one row, each from its own states."""
    if cu_seqlens is None:
        return _tokens(step, inputs, states)
    outputs, finals = [], []
    bounds = cu_seqlens.tolist()
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        o, final = _tokens(step, [x[:, start:end] for x in inputs], [x[n : n + 1] for x in states])
        outputs.append(o)
        finals.append(final)
    return torch.cat(outputs, 1), [torch.cat(parts) for parts in zip(*finals, strict=True)]


def _tokens(step: Callable[..., tuple[Tensor, Any]], inputs: list[Tensor], states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    outputs = []
    for t in range(inputs[0].shape[1]):
        o, states = step(*(x[:, t] for x in inputs), *states)
        outputs.append(o)
    return torch.stack(outputs, 1), states


def _checked(q: Tensor, k: Tensor, v: Tensor, initial_state: Any, cu_seqlens: Tensor | None) -> None:
    """What the functions, or their kernels' products of tiles, refuse."""
    assert q.dtype == k.dtype == v.dtype, "tiles of different dtypes cannot be multiplied"
    states = initial_state if isinstance(initial_state, tuple) else (initial_state,)
    if cu_seqlens is not None:
        assert cu_seqlens.dtype == torch.int64 and cu_seqlens[0] == 0 and cu_seqlens[-1] == q.shape[1]
        assert (cu_seqlens.diff() > 0).all()
        if q.shape[0] != 1:
            raise ValueError(f"The batch size is expected to be 1 rather than {q.shape[0]} when using `cu_seqlens`.")
    for state in states:
        if state is not None:
            assert state.dtype == torch.float32, "initial_state must be in float32."
            assert state.shape[0] == (q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1)


def _recurrence(
    stub: Stub, name: str, step: Callable[..., tuple[Tensor, list[Tensor]]], inputs: list[Tensor], scale: float | None,
    initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    q, k, v = inputs[:3]
    stub.calls.append((name, {"inputs": inputs, "scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}))
    _checked(q, k, v, initial_state, cu_seqlens)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    if stub.defect == "scale":
        scale = scale * 0.9
    count = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    state = torch.zeros(count, *k.shape[2:], v.shape[-1]) if initial_state is None else initial_state
    if stub.defect == "state":
        state = state.mT
    if stub.defect == "boundaries" and cu_seqlens is not None:
        cu_seqlens, state = cu_seqlens[[0, -1]], state[:1]
    o, (final,) = _documents(step, [q.double() * scale, *(x.double() for x in inputs[1:])], [state.double()], cu_seqlens)
    if stub.defect == "boundaries":
        final = final.expand(count, *final.shape[1:])
    if stub.defect == "backward":
        o = _Refuses.apply(o)
    return o.to(q.dtype), final.float() if output_final_state else None


class _Refuses(torch.autograd.Function):
    """A kernel that is known to be wrong on this device, and says so when it is too late."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError("Triton >= 3.4.0 and < 3.7.1 on Hopper GPUs produces incorrect results")


def _functions(stub: Stub) -> dict[str, dict[str, Callable[..., Any]]]:
    def chunk_gated_delta_rule(
        q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
        use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None,
        chunk_indices=None, cp_context=None,
    ):  # fmt: skip
        def step(q, k, v, g, beta, S):
            S = S * g.exp()[..., None, None]
            S = S + torch.einsum("bhk,bhv->bhkv", k, beta[..., None] * (v - torch.einsum("bhk,bhkv->bhv", k, S)))
            return torch.einsum("bhk,bhkv->bhv", q, S), [S]

        return _recurrence(
            stub, "chunk_gated_delta_rule", step, [q, k, v, g, beta], scale, initial_state, output_final_state, cu_seqlens
        )

    def chunk_kda(
        q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
        use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, safe_gate=False, lower_bound=None,
        disable_recompute=False, return_intermediate_states=False, state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None,
        cp_context=None, use_graph=False, max_num_seqs=None,
    ):  # fmt: skip
        def step(q, k, v, g, beta, S):
            S = S * g.exp()[..., None]
            S = S + torch.einsum("bhk,bhv->bhkv", beta[..., None] * k, v - (k[..., None] * S).sum(-2))
            return torch.einsum("bhk,bhkv->bhv", q, S), [S]

        assert g.shape == k.shape and beta.shape == k.shape[:3]
        return _recurrence(stub, "chunk_kda", step, [q, k, v, g, beta], scale, initial_state, output_final_state, cu_seqlens)

    def chunk_simple_gla(
        q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, state_v_first=False,
        cu_seqlens=None, cu_seqlens_cpu=None,
    ):  # fmt: skip
        def step(q, k, v, g, S):
            S = S * g.exp()[..., None, None] + k[..., None] * v[..., None, :]
            return (q[..., None] * S).sum(-2), [S]

        assert g is not None and g.shape == q.shape[:3]
        return _recurrence(stub, "chunk_simple_gla", step, [q, k, v, g], scale, initial_state, output_final_state, cu_seqlens)

    def chunk_gla(
        q, k, v, g, scale=None, initial_state=None, output_final_state=False, state_v_first=False, cu_seqlens=None,
        cu_seqlens_cpu=None,
    ):  # fmt: skip
        def step(q, k, v, g, S):
            S = S * g.exp()[..., None] + k[..., None] * v[..., None, :]
            return (q[..., None] * S).sum(-2), [S]

        assert q.shape == k.shape == g.shape, "q, k, g must have the same shape."
        return _recurrence(stub, "chunk_gla", step, [q, k, v, g], scale, initial_state, output_final_state, cu_seqlens)

    def chunk_dplr_delta_rule(
        q, k, v, a, b, gk, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, cu_seqlens_cpu=None,
        safe_gate=False, chunk_size=None, disable_recompute=False, cp_context=None, lower_bound=None,
    ):  # fmt: skip
        def step(q, k, v, a, b, gk, S):
            read = (S * a[..., None]).sum(-2, keepdim=True)
            S = S * gk.exp()[..., None] + k[..., None] * v[..., None, :] + read * b[..., None]
            return torch.einsum("bhk,bhkv->bhv", q, S), [S]

        return _recurrence(
            stub, "chunk_dplr_delta_rule", step, [q, k, v, a, b, gk], scale, initial_state, output_final_state, cu_seqlens
        )

    def chunk_gsa(
        q, k, v, s, g=None, scale=None, initial_state=None, output_final_state=False, checkpoint_level=2, cu_seqlens=None,
        cu_seqlens_cpu=None,
    ):  # fmt: skip
        def step(q, k, v, s, g, Kt, Vt):
            Kt = Kt * g.exp()[..., None, :] + k[..., None] * s[..., None, :]
            weights = (q[..., None] * Kt).sum(-2).softmax(-1)
            Vt = Vt * g.exp()[..., None] + s[..., None] * v[..., None, :]
            return (weights[..., None] * Vt).sum(-2), [Kt, Vt]

        stub.calls.append(("chunk_gsa", {"inputs": [q, k, v, s, g], "scale": scale, "cu_seqlens": cu_seqlens}))
        _checked(q, k, v, initial_state, cu_seqlens)
        assert s.dtype == k.dtype
        count = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        if initial_state is None:
            initial_state = (
                torch.zeros(count, *k.shape[2:], s.shape[-1]),
                torch.zeros(count, k.shape[2], s.shape[-1], v.shape[-1]),
            )
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        inputs = [q.double() * scale, *(x.double() for x in (k, v, s, g))]
        o, finals = _documents(step, inputs, [x.double() for x in initial_state], cu_seqlens)
        return o.to(q.dtype), [x.float() if output_final_state else None for x in finals]

    return {
        "gated_delta_rule": {"chunk_gated_delta_rule": chunk_gated_delta_rule},
        "kda": {"chunk_kda": chunk_kda},
        "simple_gla": {"chunk_simple_gla": chunk_simple_gla},
        "gla": {"chunk_gla": chunk_gla},
        "generalized_delta_rule": {"chunk_dplr_delta_rule": chunk_dplr_delta_rule},
        "gsa": {"chunk_gsa": chunk_gsa},
    }


def install(monkeypatch: pytest.MonkeyPatch, version: str = VERSION) -> Stub:
    """Put the package (and a triton) into ``sys.modules`` until the test ends."""
    stub = Stub()

    def module(name: str, **content: Any) -> None:
        made = ModuleType(name)
        made.__spec__ = ModuleSpec(name, None, is_package=True)
        made.__path__ = []
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)

    module("triton")
    module("fla", __version__=version)
    module("fla.ops")
    for name, functions in _functions(stub).items():
        module(f"fla.ops.{name}", **functions)
    return stub
