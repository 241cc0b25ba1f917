"""Every registered mixer with its presets, and a mixer taken out of a model to be called by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import limbeck.config.parts  # noqa: F401  fills the registries
from families import tiny_model
from limbeck.config.parts.mixers import MIXERS
from limbeck.models.structure import attention_view, decoder_layers

EXTRA: dict[str, dict[str, Any]] = {
    "swa-narrow": {"kind": "swa", "window": 5, "sinks": 2},
    "swa-no-sinks": {"kind": "swa", "window": 3, "sinks": 0},
    "gated_deltanet-plain": {"kind": "gated_deltanet", "decay": "none", "beta": "one"},
    "gated_deltanet-everything": {"kind": "gated_deltanet", "short_conv": 3, "activation": "silu", "deep_kv": True, "chunk": 8},
    "gated_deltanet-normed": {"kind": "gated_deltanet", "output_norm": True},
    "deltanet-everything": {"kind": "deltanet", "short_conv": 2, "beta": "one", "output_norm": True, "deep_kv": True, "gate_bias": False},
    "kda-everything": {"kind": "kda", "short_conv": 3, "activation": "silu", "output_norm": True, "chunk": 8, "rope": False},
    "gla-normed": {"kind": "gla", "output_norm": True, "short_conv": 3, "chunk": 8},
    "lightning-normed": {"kind": "lightning", "output_norm": True, "output_gate": False, "rope": False, "keep_qk_norm": False},
    "mamba2-convolution": {"kind": "mamba2", "short_conv": 4, "activation": "silu", "output_norm": True, "qk_norm": "none"},
    "gated_deltanet-free-keys": {"kind": "gated_deltanet", "qk_norm": "none", "beta": "learned"},
    "hgrn-everything": {"kind": "hgrn", "short_conv": 3, "rope": True, "qk_norm": "none", "output_norm": True, "chunk": 8},
    "gsa-few": {"kind": "gsa", "slots": 5, "qk_norm": "none", "decay_temperature": 1, "chunk": 8},
    "path-plain": {"kind": "path", "rope": False, "short_conv": 0, "beta_init": 1.0, "chunk": 8},
    "rwkv7-plain": {"kind": "rwkv7", "token_shift": False, "rope": False, "output_norm": True, "chunk": 8},
}


def mixer_cases() -> dict[str, dict[str, Any]]:
    """Options by name: every kind in the registry, every preset of those that have some, and settings the defaults leave out."""
    cases: dict[str, dict[str, Any]] = {}
    for kind in MIXERS:
        for preset in getattr(MIXERS.options(kind), "Presets", None) or (None,):
            name = kind if preset in (None, "default") else f"{kind}-{preset}"
            cases[name] = {"kind": kind} if preset is None else {"kind": kind, "preset": preset}
    return {**cases, **EXTRA}


CASES = mixer_cases()


def options_of(case: str) -> Any:
    """Validated options of a case."""
    return MIXERS.options(CASES[case]["kind"]).model_validate(CASES[case])


class Bench:
    """One mixer made from a tiny model's layer, with what the model would hand to it."""

    def __init__(self, options: Any, family: str = "qwen3", *, layer: int = 0, seed: int = 0, stirred: bool = True):
        self.base: Any = tiny_model(family, seed=seed, dtype=torch.get_default_dtype())
        self.view = attention_view(self.base, layer)
        self.layer = layer
        self.mixer: Any = MIXERS.build(options, self.view.facts, self.base.config, layer)
        self.report = self.mixer.init_from(self.view)
        self.width = self.view.facts.hidden_size
        if stirred:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in self.mixer.parameters():
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))

    def inputs(self, rows: int, length: int, seed: int = 0) -> Tensor:
        """Random layer inputs ``[B, T, D]``."""
        return torch.randn(rows, length, self.width, generator=torch.Generator().manual_seed(seed))

    def rope(self, position_ids_BT: Tensor) -> Any:
        """The family's ``(cos, sin)`` for positions."""
        rotary, config = self.base.model.rotary_emb, self.base.config
        x = torch.zeros(1, dtype=torch.get_default_dtype())
        if config.model_type == "gemma3_text":
            return rotary(x, position_ids_BT, config.layer_types[self.layer])
        return rotary(x, position_ids_BT)

    def __call__(self, x_BTD: Tensor, position_ids_BT: Tensor | None = None, **kwargs: Any) -> Tensor:
        if position_ids_BT is None:
            position_ids_BT = torch.arange(x_BTD.shape[1]).expand(x_BTD.shape[:2])
        return self.mixer(x_BTD, position_embeddings=self.rope(position_ids_BT), **kwargs)[0]

    def cache(self) -> DynamicCache:
        """A cache that has the mixer's own layer in its place."""
        cache = DynamicCache()
        cache.layers = [self.mixer.cache_layer() for _ in range(self.layer + 1)]
        return cache

    def in_chunks(self, x_BTD: Tensor, sizes: list[int], position_ids_BT: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The same tokens fed through a cache, ``sizes`` at a time."""
        if position_ids_BT is None:
            position_ids_BT = torch.arange(x_BTD.shape[1]).expand(x_BTD.shape[:2])
        cache, outputs, start = self.cache(), [], 0
        for size in sizes:
            span = slice(start, start + size)
            padding = {} if mask is None else {"padding_mask": mask[:, span]}
            outputs.append(self(x_BTD[:, span], position_ids_BT[:, span], past_key_values=cache, **padding))
            start += size
        assert start == x_BTD.shape[1] == cache.layers[self.layer].get_seq_length()
        return torch.cat(outputs, 1)

    def attention(self, x_BTD: Tensor) -> Tensor:
        """What the softmax attention itself makes of the inputs, with the mask that its model would give it."""
        made: dict[str, Tensor] = {}
        module = decoder_layers(self.base)[self.layer].self_attn

        def swap(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "hidden_states": x_BTD}

        def keep(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            made["out"] = output[0]

        handles: list[Any] = [
            module.register_forward_pre_hook(swap, with_kwargs=True),
            module.register_forward_hook(keep, with_kwargs=True),
        ]
        self.base(torch.full(x_BTD.shape[:2], 5), use_cache=False)
        for handle in handles:
            handle.remove()
        return made["out"]


