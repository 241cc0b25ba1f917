"""A head is what its model does to hidden states, whatever the family does to logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModel

from families import FAMILIES, tiny_model, tokens
from limbeck.errors import ModelError
from limbeck.models.head import backbone, head_of
from limbeck.models.loading import build_model

_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
SCALED: dict[str, dict[str, Any]] = {
    "cohere": {**_SMALL, "model_type": "cohere", "logit_scale": 0.25, "eos_token_id": 1, "bos_token_id": 2},
    "granite": {**_SMALL, "model_type": "granite", "logits_scaling": 8.0},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, *SCALED])
def test_hidden_states_and_head_give_the_models_own_logits(family: str, tied: bool) -> None:
    if family in SCALED:
        model = build_model({**SCALED[family], "tie_word_embeddings": tied}, dtype=torch.float64)
    else:
        model = tiny_model(family, tied=tied, dtype=torch.float64)
    ids, head = tokens(2, 9), head_of(model)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        ours = head.scale * (backbone(model)(ids, use_cache=False).last_hidden_state @ head.weight_VD.T)
        if head.softcap is not None:
            ours = head.softcap * torch.tanh(ours / head.softcap)
    torch.testing.assert_close(ours, logits, rtol=1e-10, atol=1e-10)
    assert (head.weight_VD is model.get_input_embeddings().weight) == tied


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ModelError, match="causal language model"):
        head_of(AutoModel.from_config(tiny_model("llama3").config))
