"""Documents that share a row do not see each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import linear_plugin
from families import FAMILIES, LAYERS, packed_batch, tiny_model
from limbeck.errors import ModelError
from limbeck.models import packed
from limbeck.models.head import backbone
from limbeck.models.limbeck_model import wrap_student
from limbeck.models.loading import build_model
from limbeck.models.packed import FLAG, forward_packed, leak_probe, packing_kwargs

BATCH = packed_batch([[5, 9, 1, 11], [8, 8, 8, 2]], padding=3)
BASE = {"source": "tiny", "fingerprint": "none"}


def _separate(model: Any, batch: Any) -> torch.Tensor:
    """Every document (and every padded tail) alone in its own forward pass, put back where it stood."""
    hidden = torch.zeros(*batch.input_ids_BT.shape, model.config.hidden_size, dtype=model.dtype)
    for row in range(batch.documents_BT.shape[0]):
        for document in batch.documents_BT[row].unique():
            here = batch.documents_BT[row] == document
            hidden[row, here] = backbone(model)(batch.input_ids_BT[row, here][None], use_cache=False).last_hidden_state[0]
    return hidden


@pytest.mark.parametrize("layers", [None, (0, 2), tuple(range(LAYERS))], ids=["softmax", "hybrid", "all-linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_separate_documents(family: str, layers: tuple[int, ...] | None) -> None:
    model = tiny_model(family, dtype=torch.float64)
    if layers is not None:
        model = wrap_student(model, [linear_plugin.DecayOptions(layers=layers)], BASE)
    with torch.no_grad():
        leak_probe(model)
        assert getattr(model, FLAG) is True
        error = (forward_packed(model, BATCH) - _separate(model, BATCH)).abs().max()
    assert error <= (5e-6 if family == "gemma2" and layers != tuple(range(LAYERS)) else 1e-12)


def test_unpacking_gives_what_packing_gives() -> None:
    model = tiny_model("qwen3", dtype=torch.float64)
    with torch.no_grad():
        unpacked, whole = packed._unpacked(model, BATCH), packed._packed(model, BATCH)
    torch.testing.assert_close(unpacked[BATCH.token_mask_BT], whole[BATCH.token_mask_BT], rtol=0, atol=1e-12)


def test_unpacking_runs_documents_and_no_padding() -> None:
    model = tiny_model("qwen3")
    shapes: list[tuple[int, ...]] = []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    batch = packed_batch([[5, 3], [8]], padding=40)
    with torch.no_grad():
        packed._unpacked(model, batch)
        packed._unpacked(model, replace(batch, documents_BT=torch.full_like(batch.documents_BT, -1)))
    assert shapes == [(3, 8), (2, 1)]


def test_a_family_that_cannot_pack_is_unpacked() -> None:
    config = {
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
        "vocab_size": 96,
        "intermediate_size": 16,
        "num_experts": 0,
        "mlp_only_layers": [0, 1],
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    model = build_model(config)
    leak_probe(model)
    assert getattr(model, FLAG) is False
    with torch.no_grad():
        found, expected = forward_packed(model, BATCH), _separate(model, BATCH)
    torch.testing.assert_close(found[BATCH.token_mask_BT], expected[BATCH.token_mask_BT], rtol=1e-4, atol=1e-5)


class _Masked(nn.Module):
    """The mistake that switches packing off silently: an attention mask of ones on the way in."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return self.inner(input_ids=input_ids, **{**kwargs, "attention_mask": torch.ones_like(input_ids)})


def test_the_leak_probe_catches_an_attention_mask_on_the_way_in(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama3")
    inner = backbone(model)
    monkeypatch.setattr(packed, "backbone", lambda _: _Masked(inner))
    leak_probe(model)
    assert getattr(model, FLAG) is False


def test_the_leak_probe_catches_a_cache_on_the_way_in(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama3")
    inner = backbone(model)
    monkeypatch.setattr(packed, "backbone", lambda _: lambda **kwargs: inner(**{**kwargs, "use_cache": True}))
    leak_probe(model)
    assert getattr(model, FLAG) is False


class _Gossip(nn.Module):
    """Rows that add up over the batch: no packing and no unpacking keeps documents apart."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, **kwargs: Any) -> Any:
        output = self.inner(**kwargs)
        output.last_hidden_state = output.last_hidden_state.cumsum(0)
        return output


def test_a_model_that_leaks_either_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama3")
    inner = backbone(model)
    monkeypatch.setattr(packed, "backbone", lambda _: _Gossip(inner))
    with pytest.raises(ModelError, match="a document changes the next one"):
        leak_probe(model)


def test_the_probe_catches_logits_that_are_not_the_heads() -> None:
    model = tiny_model("llama3")
    model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ModelError, match="logits are not what"):
        leak_probe(model)


def test_the_probe_leaves_training_mode_as_it_was() -> None:
    model = tiny_model("llama3")
    model.train()
    leak_probe(model)
    assert model.training


def test_document_lengths_travel_under_the_names_of_transformers() -> None:
    kwargs = packing_kwargs(BATCH)
    lengths = [5, 9, 1, 11, 3, 8, 8, 8, 2, 3]
    assert kwargs["cu_seq_lens_q"].diff().tolist() == lengths
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == 11
    assert kwargs["cu_seq_lens_q"].dtype == kwargs["seq_idx"].dtype == torch.int32
    assert kwargs["seq_idx"][0, [0, 4, 5, 14, 15, 28]].tolist() == [0, 0, 1, 2, 3, 4]
