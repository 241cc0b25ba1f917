"""A tiny mixture of experts and what trains on it: for tests of routers, of one rank and of two."""

from __future__ import annotations

from typing import Any

import torch

from families import VOCABULARY, stir
from limbeck.config.parts.objectives import OBJECTIVES
from limbeck.models.loading import build_model
from limbeck.ops.ternary import Ternary
from limbeck.students.student import Student
from limbeck.students.ternary.modules import Quantised

QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "decoder_sparse_step": 1, "mlp_only_layers": [1], "norm_topk_prob": True,
    "initializer_range": 0.15, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
"""Layers 0 and 2 have experts, layer 1 is dense."""


def moe_student(dtype: torch.dtype = torch.float64, seed: int = 0) -> Student:
    model = build_model(QWEN3_MOE, seed=seed, dtype=dtype)
    stir(model, seed)
    return Student(model)


def objective(kind: str, **settings: Any) -> Any:
    """An objective of these options."""
    return OBJECTIVES.build(OBJECTIVES.options(kind).model_validate({"kind": kind, **settings}))


def ternary_weights(model: Any) -> dict[str, Ternary]:
    """Codes and scales of each ternary weight, by its name; a fused ``gate_up_proj`` whole, gate rows first."""
    modules = {path: module for path, module in model.named_modules() if isinstance(module, Quantised)}
    return {f"{path}.{name}": module.codes(name) for path, module in modules.items() for name in module.parts}
