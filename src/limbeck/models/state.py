"""What a mixer remembers between tokens, in a form that transformers' caches carry.

A hybrid's replaced layers put a :class:`MixerState` into the ``DynamicCache`` while ``config.layer_types`` stays untouched.
The state counts tokens, so that masks and positions come out right even when no layer has keys and values any more.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from limbeck.errors import ModelError


class MixerState(CacheLayerMixin):
    """Named state tensors (batch first) and the number of tokens they have seen."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    # Early initialisation would call `lazy_initialization` with keys and values, which a mixer does not have.
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, Tensor] = {}
        self.seen = 0

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={tuple(state.shape)}" for name, state in self.states.items())
        return f"{type(self).__name__}(seen={self.seen}{', ' if shapes else ''}{shapes})"

    def read(self, name: str) -> Tensor | None:
        """The named state ``[B, ...]``, or None before the first token."""
        return self.states.get(name)

    def write(self, num_tokens: int, **states: Tensor | None) -> None:
        """Keep ``states [B, ...]`` (None is left out) and count ``num_tokens`` more tokens, padding included."""
        self.states.update({name: state for name, state in states.items() if state is not None})
        self.seen += num_tokens
        self.is_initialized = True

    def num_bytes(self) -> int:
        """Bytes that the states hold now."""
        return sum(state.numel() * state.element_size() for state in self.states.values())

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """``(kv_length, kv_offset)`` as a full attention layer would answer."""
        return self.seen + int(query_length), 0

    def get_max_length(self) -> int:
        """No bound."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """A mixer has no ``key_states [B, H, T, D]`` and ``value_states [B, H, T, D]``: raises :class:`ModelError`."""
        raise ModelError("a mixer keeps states, not keys and values: its cache layer is written by the mixer itself")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """A mixer has no ``key_states [B, H, T, D]`` and ``value_states [B, H, T, D]``: raises :class:`ModelError`."""
        raise ModelError(
            "softmax attention wrote keys and values into a mixer's cache layer: the cache belongs to a student with other "
            "layers replaced; make one with `model.new_cache()`"
        )

    def crop(self, tokens_to_remove: int) -> None:
        """A recurrent state cannot be rewound: raises :class:`ModelError`."""
        raise ModelError(
            "a mixer's state cannot be rewound by tokens, so assisted (speculative) and prompt-lookup decoding do not work "
            "with a hybrid: call generate() without `assistant_model` and `prompt_lookup_num_tokens`"
        )

    def reset(self) -> None:
        """Forget everything."""
        self.states.clear()
        self.seen = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row ``i`` becomes what row ``beam_idx[i]`` was, ``beam_idx [B]``."""
        self._map(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times in a row."""
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices [rows]`` (numbers), or those of a boolean mask ``[B]``."""
        self._map(lambda state: state[indices.to(state.device)])

    def offload(self) -> None:
        """States are small and stay where they are."""

    def prefetch(self) -> None:
        """States are small and stay where they are."""

    def _map(self, change: Any) -> None:
        self.states = {name: change(state) for name, state in self.states.items()}


def mixer_state(cache: Cache | None, layer: int, kind: type[MixerState] = MixerState) -> Any:
    """The cache layer of a mixer, None without a cache.

    A plain ``DynamicCache`` (made by a backbone that was called directly, say) raises :class:`ModelError`: it would silently lose
    the state.
    """
    if cache is None:
        return None
    held = cache.layers[layer] if layer < len(cache.layers) else None
    if not isinstance(held, kind):
        raise ModelError(
            f"layer {layer} is a mixer and the cache holds {type(held).__name__} for it: "
            "make the cache with `model.new_cache()`, or call the model itself (not its backbone) with use_cache"
        )
    return held
