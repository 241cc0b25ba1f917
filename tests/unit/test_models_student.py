"""Students are models of their base family: equal where nothing was replaced, and generating with a cache as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import linear_plugin
from families import FAMILIES, LAYERS, tiny_model, tokens
from limbeck.errors import ModelError
from limbeck.models.head import backbone
from limbeck.models.limbeck_model import LimbeckConfig, check_reloadable, make_student_class, surgeries_of, wrap_student
from limbeck.models.packed import FLAG, leak_probe

BASE = {"source": "tiny", "fingerprint": "none"}
MIXED, ALL = (0, 2), tuple(range(LAYERS))


def _student(family: str, layers: tuple[int, ...], **changes: Any) -> Any:
    tied = family in ("llama3", "gemma2")
    return wrap_student(
        tiny_model(family, tied=tied, dtype=torch.float64, **changes), [linear_plugin.DecayOptions(layers=layers)], BASE
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_that_keeps_every_layer_is_bit_identical_to_its_base(family: str, tied: bool) -> None:
    base = tiny_model(family, tied=tied)
    student = wrap_student(base, [linear_plugin.DecayOptions(layers=())], BASE)
    ids = tokens(2, 15)
    with torch.no_grad():
        assert torch.equal(student(ids).logits, base(ids).logits)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(student(ids).logits, base(ids).logits)


@pytest.mark.parametrize("layers", [MIXED, ALL], ids=["hybrid", "all-linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_equals_generation_without(family: str, layers: tuple[int, ...]) -> None:
    """Greedy and beams, one row left-padded."""
    student = _student(family, layers)
    ids, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.int64)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    for beams in (1, 3):
        with_cache = student.generate(ids, use_cache=True, num_beams=beams, **options)
        assert torch.equal(with_cache, student.generate(ids, use_cache=False, num_beams=beams, **options))


@pytest.mark.parametrize("layers", [MIXED, ALL], ids=["hybrid", "all-linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_in_chunks_equals_one_pass(family: str, layers: tuple[int, ...]) -> None:
    student, ids = _student(family, layers), tokens(2, 40)
    with torch.no_grad():
        whole = student(ids, use_cache=False).logits
        cache, parts = student.new_cache(), []
        for start, end in ((0, 13), (13, 14), (14, 33), (33, 40)):
            parts.append(student(ids[:, start:end], past_key_values=cache, use_cache=True).logits)
    assert (torch.cat(parts, 1) - whole).abs().max() <= (1e-4 if family == "gemma2" else 1e-10)
    assert cache.get_seq_length() == 40


def test_left_padding_does_not_change_a_row() -> None:
    student, ids = _student("qwen3", MIXED), tokens(1, 9)
    padded = torch.cat([torch.full((1, 5), 7), ids], 1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.int64), torch.ones_like(ids)], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        alone = student(ids, use_cache=False).logits
        beside = student(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 5:]
        ignored = student(padded, position_ids=positions, use_cache=False).logits[:, 5:]
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-10)
    assert (ignored - alone).abs().max() > 1e-3


def test_a_cache_holds_states_where_layers_were_replaced_and_layer_types_stay() -> None:
    student = _student("gemma3", MIXED)
    assert [type(layer).__name__ for layer in student.new_cache().layers] == [
        "MixerState",
        "DynamicLayer",
        "MixerState",
        "DynamicLayer",
    ]
    assert "linear_attention" not in student.config.layer_types
    assert student.replaced() == list(MIXED) and sorted(student.mixers()) == list(MIXED)


def test_calling_the_backbone_with_a_cache_is_an_error_and_not_silently_wrong_text() -> None:
    student = _student("qwen3", MIXED)
    with pytest.raises(ModelError, match="new_cache"):
        backbone(student)(tokens(1, 4), use_cache=True)


def test_decoding_that_needs_another_cache_is_refused_in_words() -> None:
    student, ids = _student("qwen3", MIXED), tokens(1, 6)
    with pytest.raises(ModelError, match="cache_implementation"):
        student.generate(ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises((ModelError, ValueError), match=r"rewound|rollback|crop"):
        student.generate(ids, max_new_tokens=8, prompt_lookup_num_tokens=2, do_sample=False)


def test_a_student_keeps_the_precision_of_its_base_and_shares_its_tensors() -> None:
    base = tiny_model("llama3", dtype=torch.bfloat16)
    student = wrap_student(base, [linear_plugin.DecayOptions(layers=MIXED)], BASE)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert backbone(student).rotary_emb.inv_freq.dtype == torch.float32
    assert student.lm_head.weight is base.lm_head.weight
    assert type(base).__name__ == "LlamaForCausalLM" and not isinstance(base.config, LimbeckConfig)
    assert type(backbone(base).layers[0].self_attn).__name__ == "LlamaAttention"


def test_the_class_is_made_once_for_a_family() -> None:
    student = _student("qwen3", MIXED)
    assert type(student) is make_student_class(tiny_model("qwen3").config)
    assert isinstance(student.config, LimbeckConfig)
    assert student.config.limbeck["base"]["model_type"] == "qwen3"
    assert [report.fresh for report in student.surgery_reports] == [["decay_H", "gain"]] * 2
    with pytest.raises(ModelError, match="operated on already"):
        wrap_student(student, [], BASE)


def test_what_is_known_of_packing_is_not_inherited_from_the_base() -> None:
    base = tiny_model("qwen3")
    leak_probe(base)
    student = wrap_student(base, [linear_plugin.DecayOptions(layers=MIXED)], BASE)
    assert hasattr(base, FLAG) and not hasattr(student, FLAG)


def test_an_unknown_surgery_names_the_way_out() -> None:
    config = _student("qwen3", MIXED).config
    config.limbeck = {**config.limbeck, "surgery": [{"kind": "hybridise"}]}
    with pytest.raises(ModelError, match="did you mean 'hybridize'"):
        surgeries_of(config)


@pytest.mark.parametrize("way", ["buffer", "attribute"])
def test_a_mixer_that_would_not_survive_a_reload_is_refused(way: str) -> None:
    mixer = nn.Module()
    mixer.inner = nn.Linear(2, 2)
    if way == "buffer":
        mixer.inner.register_buffer("scale", torch.ones(2), persistent=False)
    else:
        mixer.inner.scale = torch.ones(2)
    with pytest.raises(ModelError, match="scale"):
        check_reloadable({3: mixer})
