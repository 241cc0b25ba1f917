"""Tiny models beside the families that students are made from: what tests of adapters need."""

from __future__ import annotations

from typing import Any

import torch

from families import VOCABULARY, stir
from limbeck.models.loading import build_model

QWEN3_NEXT: dict[str, Any] = {
    "model_type": "qwen3_next", "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 24,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 20,
    "pad_token_id": 0, "initializer_range": 0.15,
}  # fmt: skip


def qwen3_next(dtype: torch.dtype = torch.float64) -> Any:
    """Linear attention, gated attention, routed experts and a shared one; it cannot pack on CPU."""
    model = build_model(QWEN3_NEXT, dtype=dtype)
    # The grouped product of experts has no fp64.
    model.set_experts_implementation("eager")
    stir(model)
    return model


def all_double() -> Any:
    """A model of two layers that computes in fp64 throughout: the other families' norms round to fp32, which blurs differences of losses."""
    config = {
        "model_type": "gpt_neox", "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
        "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    model = build_model(config, dtype=torch.float64)
    stir(model)
    return model
