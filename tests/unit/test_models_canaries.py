"""One canary for each private thing of transformers that Limbeck leans on: an upgrade that moves it is named here first."""

from __future__ import annotations

import inspect

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation.utils import GenerationMixin
from transformers.models.auto import configuration_auto, modeling_auto

from families import packed_batch, tiny_model, tokens
from limbeck.models.limbeck_config import LimbeckConfig
from limbeck.models.state import MixerState


def test_a_cache_layer_has_no_abstract_method_that_a_mixer_state_lacks() -> None:
    assert CacheLayerMixin.__abstractmethods__ <= set(vars(MixerState))
    assert {"supports_early_init", "is_compileable", "is_croppable"} <= set(vars(CacheLayerMixin))


def test_the_cache_asks_its_layers_for_beams_rows_and_lengths() -> None:
    for method in ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop", "reset"):
        assert f".{method}(" in inspect.getsource(getattr(Cache, method)), method


def test_a_dynamic_cache_made_from_a_config_has_one_layer_a_decoder_layer() -> None:
    assert len(DynamicCache(config=tiny_model("qwen3").config).layers) == 4


def test_generate_prepares_its_cache_where_students_override_it() -> None:
    parameters = list(inspect.signature(GenerationMixin._prepare_cache_for_generation).parameters)
    assert parameters[1:3] == ["generation_config", "model_kwargs"]


def test_the_table_of_configs_is_where_the_import_hook_waits() -> None:
    assert configuration_auto.__name__ == "transformers.models.auto.configuration_auto"
    assert configuration_auto.CONFIG_MAPPING["limbeck"] is LimbeckConfig
    assert type(tiny_model("qwen3").config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING


def test_loading_info_names_what_is_missing_unexpected_and_mismatched() -> None:
    from transformers.modeling_utils import LoadStateDictInfo

    fields = set(inspect.signature(LoadStateDictInfo).parameters)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors"} <= fields


def test_tied_weights_are_listed_by_name() -> None:
    assert tiny_model("llama3", tied=True).all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    assert tiny_model("llama3").all_tied_weights_keys == {}


def test_the_attention_implementation_is_a_settable_field_of_a_config_that_saving_drops() -> None:
    config = tiny_model("llama3").config
    assert config._attn_implementation == "sdpa"
    assert not any("attn_implementation" in name for name in config.to_dict())


def test_forward_hands_unknown_keywords_down_to_attention() -> None:
    model, seen = tiny_model("llama3"), {}
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(tokens(1, 4), padding_mask=torch.ones(1, 4), documents_BT=torch.zeros(1, 4))
    assert {"padding_mask", "documents_BT", "position_embeddings"} <= set(seen)


def test_packing_is_detected_only_without_mask_and_cache() -> None:
    model, batch = tiny_model("llama3", dtype=torch.float64), packed_batch([[6, 6]])
    other = packed_batch([[6, 6]], seed=1)
    ids = batch.input_ids_BT.clone()
    ids[:, :6] = other.input_ids_BT[:, :6]

    def moved(**kwargs: object) -> float:
        with torch.no_grad():
            a, b = (
                model.model(x, position_ids=batch.position_ids_BT, **kwargs).last_hidden_state[:, 6:]
                for x in (batch.input_ids_BT, ids)
            )
        return float((a - b).abs().max())

    assert moved(attention_mask=None, use_cache=False) == 0
    assert moved(attention_mask=torch.ones_like(ids), use_cache=False) > 1e-3
    assert moved(attention_mask=None, use_cache=True) > 1e-3


def test_a_model_knows_its_backbone_by_prefix() -> None:
    assert isinstance(PreTrainedModel.base_model_prefix, str)
    assert tiny_model("gemma3").base_model_prefix == "model"
