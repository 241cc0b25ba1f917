"""One token at a time: the cache of a model, teacher or hybrid, and the step that uses it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

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


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    ids_1T: Tensor,
    *,
    tokens: int,
    ends: Collection[int],
    temperature: float = 0.0,
    seed: int = 0,
    acting: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[int]:
    """Ids behind a prompt, at most ``tokens``, up to one of ``ends`` (left out): greedy at temperature 0, else sampled.

    Sampling draws from a generator of its own, on the CPU: it moves no global random state, and two models meet the same draws.
    ``acting`` is entered for each step alone: whoever reads the ids runs between them, and may never ask for the next.
    """
    generator, cache = torch.Generator().manual_seed(seed), new_cache(model)
    for _ in range(tokens):
        with acting():
            logits_V = step(model, ids_1T, cache)[0]
        if temperature > 0:
            token = int(torch.multinomial((logits_V / temperature).softmax(-1).cpu(), 1, generator=generator))
        else:
            token = int(logits_V.argmax())
        if token in ends:
            return
        yield token
        ids_1T = torch.tensor([[token]], device=ids_1T.device)


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
