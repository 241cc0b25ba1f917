"""The output head of a causal language model as a value, and the network below it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from limbeck.errors import ModelError
from limbeck.types import Head


def head_of(model: PreTrainedModel, num_ids: int | None = None) -> Head:
    """The output projection with what its family does to the logits; rows from ``num_ids`` on are masked as padding.

    Gemma caps them (``final_logit_softcapping``), Cohere multiplies them by ``logit_scale``, Granite divides them by
    ``logits_scaling``.  :func:`limbeck.models.packed.leak_probe` checks the result against the model's own logits.
    """
    projection = model.get_output_embeddings()
    if projection is None or not isinstance(getattr(projection, "weight", None), nn.Parameter):
        raise ModelError(
            f"{type(model).__name__} has no output projection: Limbeck needs a causal language model (AutoModelForCausalLM)"
        )
    config = model.config.get_text_config(decoder=True)
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:
        scale *= float(config.logit_scale)
    if getattr(config, "logits_scaling", None) is not None:
        scale /= float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None)
    head = Head(
        weight_VD=projection.weight,
        bias_V=getattr(projection, "bias", None),
        softcap=None if softcap is None else float(softcap),
        scale=scale,
    )
    return head if num_ids is None else without_padding(head, num_ids)


def without_padding(head: Head, num_ids: int) -> Head:
    """The head with its rows from ``num_ids`` on masked, if it has any."""
    rows = head.weight_VD.shape[0]
    if num_ids >= rows:
        return head
    return replace(head, vocab_mask_V=torch.arange(rows, device=head.weight_VD.device) < num_ids)


def backbone(model: PreTrainedModel) -> nn.Module:
    """The decoder below the head: token ids to final hidden states ``[B, T, D]``, after the final norm."""
    inner = getattr(model, model.base_model_prefix, None) if model.base_model_prefix else None
    if inner is None or inner is model:
        raise ModelError(
            f"{type(model).__name__} has no decoder below its head (looked for `{model.base_model_prefix}`): "
            "Limbeck needs a causal language model (AutoModelForCausalLM)"
        )
    return inner
