"""Attention layers are found and read by structure, and what Limbeck cannot convert is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from families import FAMILIES, tiny_model, tokens
from limbeck.errors import ModelError
from limbeck.models.head import backbone
from limbeck.models.loading import build_model
from limbeck.models.structure import AttentionView, attention_slot, attention_view, decoder_layers


def _recompute(view: AttentionView, x_BTD: torch.Tensor, position_embeddings: Any) -> torch.Tensor:
    """Softmax attention from nothing but a view: whatever the view forgets makes this differ from the module."""
    facts = view.facts
    B, T, _ = x_BTD.shape
    q = linear(x_BTD, view.q_weight_QD, view.q_bias).view(B, T, facts.num_heads, facts.head_dim)
    k = linear(x_BTD, view.k_weight_KD, view.k_bias).view(B, T, facts.num_kv_heads, facts.head_dim)
    v = linear(x_BTD, view.v_weight_KD, view.v_bias).view(B, T, facts.num_kv_heads, facts.head_dim)
    if facts.qk_norm != "none":
        q, k = facts.normalise(view.q_norm, q), facts.normalise(view.k_norm, k)
    q, k = facts.rotate(q.transpose(1, 2), k.transpose(1, 2), position_embeddings)
    k, v = (t.repeat_interleave(facts.num_groups, dim=1) for t in (k, v.transpose(1, 2)))
    scores = q @ k.mT * facts.scaling
    if facts.softcap is not None:
        scores = facts.softcap * torch.tanh(scores / facts.softcap)
    distance = torch.arange(T)[:, None] - torch.arange(T)[None]
    hidden = distance < 0
    if facts.sliding_window is not None:
        hidden = hidden | (distance >= facts.sliding_window)
    out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return linear(out.transpose(1, 2).flatten(-2), view.o_weight_DQ, view.o_bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_view_holds_everything_that_attention_computes_with(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    seen: dict[int, tuple[Any, ...]] = {}
    for index, layer in enumerate(decoder_layers(model)):
        getattr(layer, attention_slot(layer)).register_forward_hook(
            lambda module, args, kwargs, out, index=index: seen.__setitem__(index, (args, kwargs, out[0])), with_kwargs=True
        )
    with torch.no_grad():
        model(tokens(2, 17), use_cache=False)
        assert sorted(seen) == list(range(len(decoder_layers(model))))
        for index, (args, kwargs, out) in seen.items():
            hidden = args[0] if args else kwargs["hidden_states"]
            ours = _recompute(attention_view(model, index), hidden, kwargs["position_embeddings"])
            # The eager softmax of transformers is fp32 whatever the model is.
            torch.testing.assert_close(ours, out, rtol=1e-5, atol=1e-6 if family == "gemma2" else 1e-12)


def test_facts_tell_the_families_apart() -> None:
    facts = {family: [attention_view(tiny_model(family), i).facts for i in (0, 1)] for family in FAMILIES}
    assert facts["qwen2"][0].q_bias and facts["qwen2"][0].v_bias and not facts["qwen2"][0].o_bias
    assert [facts[f][0].qk_norm for f in ("llama3", "qwen3", "olmo2", "gemma3")] == ["none", "head", "full", "head"]
    assert facts["qwen3"][0].head_dim == 12 != facts["qwen3"][0].hidden_size // facts["qwen3"][0].num_heads
    assert [f.sliding_window for f in facts["gemma2"]] == [6, None]
    assert [f.sliding_window for f in facts["mistral"]] == [6, 6]
    assert facts["gemma2"][0].softcap == 5.0 and facts["gemma2"][0].scaling == 10**-0.5


def test_new_norms_are_the_familys_own_at_their_neutral_value() -> None:
    for family in ("qwen3", "olmo2", "gemma3"):
        facts = attention_view(tiny_model(family), 0).facts
        norms = facts.new_norms()
        assert norms is not None
        x = torch.randn(2, 5, facts.num_heads, facts.head_dim)
        power = facts.normalise(norms[0], x).flatten(2).square().mean(-1)
        torch.testing.assert_close(power, torch.ones_like(power), rtol=1e-3, atol=0)
    assert attention_view(tiny_model("llama3"), 0).facts.new_norms() is None


def test_a_partial_rotation_leaves_the_tail_and_equals_the_familys_own() -> None:
    model = tiny_model("phi3", dtype=torch.float64)
    facts = attention_view(model, 0).facts
    q, k = torch.randn(1, 4, 6, 8, dtype=torch.float64), torch.randn(1, 2, 6, 8, dtype=torch.float64)
    cos, sin = backbone(model).rotary_emb(q, torch.arange(6)[None])
    assert cos.shape[-1] == 4
    rotated = facts.rotate(q, k, (cos, sin))
    for ours, theirs, before in zip(rotated, facts.apply_rotary(q, k, cos, sin), (q, k), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours[..., 4:], before[..., 4:])
        assert not torch.equal(ours[..., :4], before[..., :4])


_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "multi-head latent attention": (
        {
            "model_type": "deepseek_v3",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "vocab_size": 40,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "intermediate_size": 16,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 2,
            "pad_token_id": 0,
        },
        "latent",
    ),
    "layers that are linear already": (
        {
            "model_type": "qwen3_next",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "vocab_size": 40,
            "intermediate_size": 16,
            "num_experts": 0,
            "mlp_only_layers": [0, 1],
            "pad_token_id": 0,
        },
        "linear already",
    ),
    "gated attention": (
        {
            "model_type": "qwen3_next",
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "layer_types": ["full_attention"],
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "vocab_size": 40,
            "intermediate_size": 16,
            "num_experts": 0,
            "mlp_only_layers": [0],
            "pad_token_id": 0,
        },
        "gated",
    ),
    "attention sinks": (
        {
            "model_type": "gpt_oss",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "vocab_size": 40,
            "intermediate_size": 16,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "pad_token_id": 0,
        },
        "sinks",
    ),
    "one fused projection under another name": (
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0},
        "c_attn",
    ),
}


@pytest.mark.parametrize("what", _REFUSED)
def test_what_cannot_be_converted_is_refused_by_name(what: str) -> None:
    config, word = _REFUSED[what]
    model = build_model(config, attention=None)
    with pytest.raises(ModelError, match=word):
        attention_view(model, 0)


def test_encoder_decoders_are_refused_before_anything_is_built() -> None:
    with pytest.raises(ModelError, match="encoder-decoder"):
        build_model({"model_type": "t5", "vocab_size": 40, "d_model": 16})
