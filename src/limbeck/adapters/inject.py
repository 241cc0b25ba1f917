"""Many LoRAs in one batched forward: ``y = base(x) + scale * (x A^T) B^T`` in the target Linears, by products over the batch.

Rows of one adapter stand together, so that ``x [N * k, T, I]`` is ``[N, k * T, I]`` and neither A nor B is ever copied; no ``dW`` is
formed.  The base is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.adapters.spec import Adapters, AdapterSpec
from limbeck.adapters.targets import modules_of
from limbeck.errors import AdapterError

_ACTIVE: ContextVar[Mapping[Injector, Adapters]] = ContextVar("active_adapters", default={})  # noqa: B039 - never changed in place


class Injector:
    """Lets LoRAs of one spec act in a model while :meth:`active` is entered.

    Outside of it the model is exactly what it was.  Raises :class:`AdapterError` if the spec does not fit the model.
    """

    def __init__(self, model: nn.Module, spec: AdapterSpec):
        self.spec = spec
        self.model = model
        self.modules = modules_of(model, spec)
        self._handles = [
            module.register_forward_hook(partial(self._hook, name, row))
            for name, modules in self.modules.items()
            for row, module in enumerate(modules)
        ]
        # Below a layer's input rows may stand for tokens (experts flatten them): only there can they be counted.
        first = {f"{site.prefix}.{site.layers[0]}" for site in spec.sites}
        self._handles += [model.get_submodule(path).register_forward_pre_hook(self._count_rows, with_kwargs=True) for path in sorted(first)]

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def active(self, adapters: Adapters | None) -> Iterator[None]:
        """Within: rows ``n * k ... (n + 1) * k - 1`` of every input get adapter ``n`` of N, where k is rows / N.  None: the base.

        The backward pass may run outside: a recomputed layer re-enters through :func:`checkpoint_context` (or the engine's own
        recomputation, which keeps the whole context).
        """
        if adapters is not None:
            _same_sites(self.spec, adapters.spec)
            _refuse_reentrant(self.model)
        others = {key: value for key, value in _ACTIVE.get().items() if key is not self}
        token = _ACTIVE.set(others if adapters is None else {**others, self: adapters})
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def _count_rows(self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        adapters = _ACTIVE.get().get(self)
        if adapters is not None:
            _shared_out(len(next(x for x in (*inputs, *named.values()) if isinstance(x, Tensor))), len(adapters))

    def _hook(self, name: str, row: int, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        adapters = _ACTIVE.get().get(self)
        if adapters is None:
            return None
        return output + low_rank(inputs[0], adapters.A[name][:, row], adapters.B[name][:, row], adapters.spec.scale)


def low_rank(x: Tensor, A_NRI: Tensor, B_NOR: Tensor, scale: float) -> Tensor:
    """``scale * (x A^T) B^T`` with adapter n for the n-th of N equal parts of the leading dimension of ``x [..., I]``; ``[..., O]``."""
    count, _, size = A_NRI.shape
    _shared_out(x.shape[0], count)
    A, B = A_NRI.to(x.dtype), B_NOR.to(x.dtype)
    if count == 1:
        # The scale goes where there are fewest numbers.
        return (x @ (A[0] * scale).T) @ B[0].T
    x_NMI = x.reshape(count, -1, size)
    return torch.bmm(torch.bmm(x_NMI, (A * scale).mT), B.mT).view(*x.shape[:-1], B.shape[1])


def checkpoint_context() -> tuple[AbstractContextManager, AbstractContextManager]:
    """``context_fn`` of ``torch.utils.checkpoint``: a layer is recomputed with the adapters that it ran with.

    For transformers: ``model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_context})``.
    """
    return nullcontext(), _activated(_ACTIVE.get())


@contextmanager
def _activated(adapters: Mapping[Injector, Adapters]) -> Iterator[None]:
    token = _ACTIVE.set(adapters)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def _shared_out(rows: int, count: int) -> None:
    if rows % count:
        raise AdapterError(f"{rows} rows cannot be shared out evenly to {count} adapters")


def _same_sites(wanted: AdapterSpec, found: AdapterSpec) -> None:
    if wanted.sites is not found.sites and set(wanted.sites) != set(found.sites):
        names = sorted({s.name for s in wanted.sites} ^ {s.name for s in found.sites})
        raise AdapterError(f"these adapters change other Linears than the ones prepared ({', '.join(names) or 'in other shapes or layers'})")


def _refuse_reentrant(model: nn.Module) -> None:
    """Reentrant checkpointing runs a shared generator's graph backward twice, or recomputes without the adapters."""
    for module in model.modules():
        function: Callable[..., Any] | None = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant", False):
            raise AdapterError(
                "reentrant activation checkpointing cannot be used with injected adapters: enable it with "
                '{"use_reentrant": False, "context_fn": limbeck.adapters.inject.checkpoint_context}'
            )
