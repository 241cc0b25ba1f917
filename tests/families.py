"""Tiny random models of the families that students are made from.

Norm weights are log-normal (ones would hide a norm that is applied twice, or not at all), biases are random, and every feature
that sets a family apart is on: RoPE scaling, q/k norms, soft-caps, sliding windows shorter than the test sequences, fused
projections.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from limbeck.models.loading import build_model

VOCABULARY = 96
LAYERS = 4

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama3": {"model_type": "llama", "rope_parameters": _LLAMA3_ROPE, "attention_bias": False},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 12},
    "mistral": {"model_type": "mistral", "sliding_window": 6, "head_dim": 8},
    "olmo2": {"model_type": "olmo2"},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 12,
        "query_pre_attn_scalar": 10,
        "sliding_window": 6,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma3": {"model_type": "gemma3_text", "head_dim": 12, "query_pre_attn_scalar": 10, "sliding_window": 6},
    "phi3": {
        "model_type": "phi3",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
}
"""What each family adds to the common fields; Gemma 2 and 3 alternate window and full layers."""

EAGER_ONLY = ("gemma2",)
"""Soft-capped scores: transformers has no sdpa for them, and its eager softmax is fp32 whatever the weights are."""


def family_config(family: str, *, tied: bool = False, **changes: Any) -> dict[str, Any]:
    """A config dict for ``build_model``."""
    config = {**_COMMON, **FAMILIES[family], "tie_word_embeddings": tied, **changes}
    if family in ("gemma2", "gemma3") and "layer_types" not in changes:
        config["layer_types"] = [("sliding_attention", "full_attention")[i % 2] for i in range(config["num_hidden_layers"])]
    return config


def tiny_model(
    family: str, *, tied: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A tiny model of a family, in evaluation mode, with norms and biases that matter."""
    attention = "eager" if family in EAGER_ONLY else "sdpa"
    model = build_model(family_config(family, tied=tied, **changes), seed=seed, dtype=dtype, attention=attention)
    stir(model, seed)
    return model


def stir(model: PreTrainedModel, seed: int = 0) -> None:
    """Norm weights log-normal around the family's neutral value (1, or 0 for Gemma's offsets), biases normal."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "norm" in name:
                offset = 1.0 if parameter.abs().max() == 0 else 0.0
                parameter.copy_((0.4 * noise).exp() - offset)


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ordinary token ids, int64 ``[rows, length]``."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def packed_batch(lengths: list[list[int]], seed: int = 0, *, padding: int = 0) -> Any:
    """A packed ``Batch`` whose rows hold documents of the given lengths and a padded tail."""
    from limbeck.types import IGNORE, Batch

    rows, total = len(lengths), sum(lengths[0]) + padding
    ids = tokens(rows, total, seed)
    labels, positions, documents = (torch.zeros(rows, total, dtype=torch.int64) for _ in range(3))
    for row, sizes in enumerate(lengths):
        start = 0
        for number, size in enumerate([*sizes, *([padding] if padding else [])]):
            span = slice(start, start + size)
            pads = number == len(sizes)
            positions[row, span] = torch.arange(size)
            documents[row, span] = -1 if pads else number
            labels[row, span] = IGNORE
            if pads:
                ids[row, span] = 0
            else:
                labels[row, start : start + size - 1] = ids[row, start + 1 : start + size]
            start += size
    return Batch(ids, labels, positions, documents)
