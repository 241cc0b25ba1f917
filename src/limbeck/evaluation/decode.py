"""One token at a time: the cache of a model, teacher or hybrid, and the step that uses it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache: a hybrid brings its own, any other model has transformers' ``DynamicCache``."""
    own = getattr(model, "new_cache", None)
    return own() if own is not None else DynamicCache(config=model.config)


@torch.no_grad()
def step(model: PreTrainedModel, input_ids_BT: Tensor, cache: DynamicCache) -> Tensor:
    """Feed tokens (a prompt or one token) through the cache; float32 logits ``[B, V]`` of the last position."""
    return model(input_ids=input_ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()


@contextmanager
def evaluating(models: Mapping[str, PreTrainedModel]) -> Iterator[None]:
    """Evaluation mode for all models, and back to what each was."""
    training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    try:
        yield
    finally:
        for name, model in models.items():
            model.train(training[name])
