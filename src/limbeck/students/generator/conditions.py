"""Whose states a generator reads: the frozen base's own, or a sentence encoder's.

Shape legend: N conditions, S texts of each, C tokens of a text, D width of the states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.config.parts.surgeries import DeltaPredictorOptions, LoraGeneratorOptions
from limbeck.errors import ModelError
from limbeck.models.hidden import hidden_states, resolve_layer
from limbeck.models.structure import layer_list


class BaseStates:
    """States of a middle layer of the base, each text on its own."""

    def __init__(self, model: Any, layer: int | None):
        self.model = model
        count = len(layer_list(model))
        self.layer = resolve_layer(model, layer) if layer is not None else max(0, round(2 * count / 3) - 1)
        self.size = model.config.get_text_config(decoder=True).hidden_size

    @torch.no_grad()
    def __call__(self, condition_NSC: Tensor) -> tuple[Tensor, Tensor]:
        """``(states [N, S, C, D], mask [N, S, C])`` of token ids padded with -1."""
        mask = condition_NSC >= 0
        rows = condition_NSC.clamp_min(0).flatten(0, 1)
        (states,) = hidden_states(self.model, rows, [self.layer])
        return states.unflatten(0, condition_NSC.shape[:2]), mask


class SentenceStates:
    """Last hidden states of a Hugging Face encoder, on the text that the base's tokens spell."""

    def __init__(self, source: str, tokenizer: Any):
        from transformers import AutoModel, AutoTokenizer

        try:
            self.encoder: nn.Module = AutoModel.from_pretrained(source, trust_remote_code=False, use_safetensors=True).eval().requires_grad_(False)
            self.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except Exception as error:
            # transformers and huggingface_hub raise many unrelated types for a bad folder, a bad name and no network.
            raise ModelError(f"surgery.encoder: {source}: cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]})") from error
        self.base_tokenizer = tokenizer
        self.size = int(self.encoder.config.hidden_size)

    @torch.no_grad()
    def __call__(self, condition_NSC: Tensor) -> tuple[Tensor, Tensor]:
        """``(states [N, S, C', D], mask [N, S, C'])``; C' is the longest text in the encoder's own tokens, at most 2 C."""
        self.encoder.to(condition_NSC.device)
        texts = [self.base_tokenizer.decode([i for i in row if i >= 0]) for row in condition_NSC.flatten(0, 1).tolist()]
        # Some families count positions from 2, which the tokenizer's limit allows for and the number of embeddings does not.
        longest = min(2 * condition_NSC.shape[-1], int(getattr(self.encoder.config, "max_position_embeddings", 512)), self.tokenizer.model_max_length)
        found = self.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(condition_NSC.device)
        states = self.encoder(**found).last_hidden_state
        mask = found["attention_mask"].bool() & (condition_NSC >= 0).flatten(0, 1).any(-1, keepdim=True)
        return states.unflatten(0, condition_NSC.shape[:2]), mask.unflatten(0, condition_NSC.shape[:2])


class NoStates:
    """For a static LoRA: nothing is read."""

    size = 1

    def __call__(self, condition_NSC: Tensor) -> tuple[Tensor, Tensor]:
        """Empty states ``[N, S, 0, 1]`` and their mask, whatever the S texts of C tokens say."""
        shape = (*condition_NSC.shape[:2], 0)
        return torch.zeros(*shape, 1, device=condition_NSC.device), torch.zeros(shape, dtype=torch.bool, device=condition_NSC.device)


def states_of(options: LoraGeneratorOptions | DeltaPredictorOptions, model: Any, tokenizer: Any, encoder: str | None) -> BaseStates | SentenceStates | NoStates:
    """What a generator's options ask for; ``encoder`` is the located source of a sentence encoder."""
    if options.condition == "none":
        return NoStates()
    if options.condition == "sentence":
        assert encoder is not None
        return SentenceStates(encoder, tokenizer)
    return BaseStates(model, options.layer)
