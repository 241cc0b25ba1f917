"""What happens inside a network in one forward: routers' logits, queries, keys and values.  By hooks that are gone after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.errors import ModelError
from limbeck.models.hidden import resolve_layer
from limbeck.models.packed import as_in_batch, forward_packed
from limbeck.models.structure import OUTPUTS, attention_slot, layer_list
from limbeck.needs import AttentionQKV, Need, RouterLogits
from limbeck.types import AttentionStates, Batch, Routing

ROUTERS = ("gate", "router")
"""What families call the module that stands beside the `experts` and chooses among them."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def forward_observed(model: PreTrainedModel, batch: Batch, needs: Mapping[type[Need], Need]) -> tuple[Tensor, dict[type[Need], Any]]:
    """Final hidden states ``[B, T, D]`` and the answers to ``needs``, with their graphs.

    ``RouterLogits`` is answered by ``{layer: Routing}``, empty for a model without experts, ``AttentionQKV`` by
    ``{layer: AttentionStates}`` under the layers' numbers as they were asked for.
    """
    if not needs:
        return forward_packed(model, batch), {}
    _refuse_compiled(model)
    readers: dict[type[Need], Callable[[], Any]] = {}
    watched: list[nn.Module] = []
    kept: dict[int, Any] = {}

    def rows(found: Tensor) -> Tensor:
        return as_in_batch(model, batch, found)

    if RouterLogits in needs:
        found = routers(model)
        watched += found.values()
        readers[RouterLogits] = lambda: {layer: _routing(router, kept[id(router)], rows) for layer, router in found.items()}
    if isinstance(need := needs.get(AttentionQKV), AttentionQKV):
        parts = {layer: attention_of(model, resolve_layer(model, layer)) for layer in need.layers}
        watched += [module for attention in parts.values() for module in projections(attention)]
        readers[AttentionQKV] = lambda: {
            layer: _states(attention, [kept[id(m)] for m in projections(attention)], rows) for layer, attention in parts.items()
        }
    with _kept(watched, kept):
        hidden_BTD = forward_packed(model, batch)
    return hidden_BTD, {need: read() for need, read in readers.items()}


def routers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The router of every layer that has one, by the layer's number."""
    found: dict[int, nn.Module] = {}
    for index, layer in enumerate(layer_list(model)):
        for module in layer.modules():
            beside = [getattr(module, name, None) for name in ROUTERS]
            chosen = [m for m in beside if isinstance(m, nn.Module)]
            if isinstance(getattr(module, "experts", None), nn.Module) and chosen:
                found[index] = chosen[0]
    return found


def attention_of(model: PreTrainedModel, layer: int) -> Any:
    """The attention of a layer whose projections give queries, keys and values; anything else is a :class:`ModelError`."""
    module = layer_list(model)[layer]
    attention = getattr(module, attention_slot(module))
    fused = isinstance(getattr(attention, "qkv_proj", None), nn.Linear)
    if output_of(attention) is None or not (fused or all(isinstance(getattr(attention, name, None), nn.Linear) for name in PROJECTIONS)):
        children = ", ".join(name for name, _ in attention.named_children())
        raise ModelError(
            f"layer {layer}: {type(attention).__name__} has no q_proj, k_proj, v_proj (or qkv_proj) and o_proj whose queries, keys and values could be "
            f"compared, only: {children}; name another layer"
        )
    return attention


def output_of(attention: nn.Module) -> nn.Linear | None:
    """The projection that reads an attention's values back."""
    return next((found for name in OUTPUTS if isinstance(found := getattr(attention, name, None), nn.Linear)), None)


def projections(attention: Any) -> list[nn.Module]:
    """The modules whose outputs are queries, keys and values: three, or one that makes all."""
    fused = getattr(attention, "qkv_proj", None)
    return [fused] if fused is not None else [getattr(attention, name) for name in PROJECTIONS]


def _routing(router: nn.Module, output: Any, rows: Callable[[Tensor], Tensor]) -> Routing:
    """The logits and the choice among what a router returns."""
    parts = [x for x in output if isinstance(x, Tensor)] if isinstance(output, tuple) else []
    logits = [x for x in parts if x.is_floating_point()]
    chosen = [x for x in parts if not x.is_floating_point()]
    if not logits or not chosen or logits[0].shape[-1] < chosen[0].shape[-1]:
        raise ModelError(f"{type(router).__name__} does not return (logits, weights, indices of experts): Limbeck does not know this family's router")
    return Routing(rows(logits[0]), rows(chosen[0]))


def _states(attention: Any, found: list[tuple[Tensor, Tensor]], rows: Callable[[Tensor], Tensor]) -> AttentionStates:
    """Queries, keys and values out of what the projections gave."""
    outputs = [rows(seen) for seen, _ in found]
    output = output_of(attention)
    assert output is not None
    width = output.in_features
    if len(outputs) == 1:
        keys = (outputs[0].shape[-1] - width) // 2
        outputs = list(outputs[0].split([width, keys, keys], -1))
    q, k, v = outputs
    if q.shape[-1] == 2 * width:
        # A gated attention's projection gives each head its query and then its gate.
        q = q.unflatten(-1, (-1, 2, attention.head_dim))[..., 0, :].flatten(-2)
    return AttentionStates(q, k, v, tuple(onward for _, onward in found))


@contextmanager
def _kept(modules: list[nn.Module], kept: dict[int, Any]) -> Iterator[None]:
    def keep(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            kept[id(module)] = output
            return None
        # Two branches, so that their gradients can be told apart.
        seen, onward = output.view_as(output), output.view_as(output)
        kept[id(module)] = (seen, onward)
        return onward

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_compiled(model: PreTrainedModel) -> None:
    # Compiled code keeps the hooks that it was traced with, whichever those were.
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in layer_list(model)):
        raise ModelError("objectives that look inside the network (routers, attention) do not go with compiled layers: set `loop.compile: false`")
