"""Hidden states below the head, of chosen layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.errors import ModelError
from limbeck.models.head import backbone
from limbeck.models.structure import layer_list


def resolve_layer(model: PreTrainedModel, layer: int) -> int:
    """A layer number from 0; negative ones count from the end."""
    count = len(layer_list(model))
    if not -count <= layer < count:
        raise ModelError(f"layer {layer}: the model has {count} layers, 0 to {count - 1} (or -{count} to -1 from the end)")
    return layer % count


def hidden_states(model: PreTrainedModel, ids_BT: Tensor, layers: Sequence[int], *, final_norm: bool = True) -> list[Tensor]:
    """States ``[B, T, D]`` after the named layers (from 0) of right-padded rows; a causal model needs no mask for these.

    With ``final_norm`` the last layer's are taken after the final norm, as transformers' ``hidden_states[-1]`` is.  Of several
    residual streams (hyper-connections) the mean is given.
    """
    wanted = [resolve_layer(model, layer) for layer in layers]
    last = len(layer_list(model)) - 1
    with _kept(layer_list(model), set(wanted)) as kept:
        final = backbone(model)(input_ids=ids_BT, attention_mask=None, use_cache=False).last_hidden_state
    return [final if layer == last and final_norm else kept[layer] for layer in wanted]


@contextmanager
def _kept(layers: nn.ModuleList, wanted: set[int]) -> Iterator[dict[int, Tensor]]:
    kept: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            states: Tensor = output[0] if isinstance(output, tuple) else output
            kept[index] = states.mean(-2) if states.ndim == 4 else states

        return hook

    handles = [layers[index].register_forward_hook(keep(index)) for index in wanted]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
