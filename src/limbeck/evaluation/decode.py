"""One token at a time: the cache of a model, teacher or hybrid, and the step that uses it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from limbeck.evaluation.sampling import Sampling


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache: a hybrid brings its own, any other model has transformers' ``DynamicCache``."""
    own = getattr(model, "new_cache", None)
    return own() if own is not None else DynamicCache(config=model.config)


@torch.no_grad()
def step(model: PreTrainedModel, input_ids_BT: Tensor, cache: DynamicCache) -> Tensor:
    """Feed tokens (a prompt or one token) through the cache; float32 logits ``[B, V]`` of the last position."""
    return model(input_ids=input_ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()


COLDEST = 1e-3
"""Temperatures below it are taken for it: logits divided by less may overflow."""


class Draw(NamedTuple):
    """A token, and the logits ``[V]`` (float32) that it was drawn from."""

    token: int
    logits_V: Tensor


def draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from logits."""
    if sampling.temperature <= 0:
        return int(logits_V.argmax())
    probabilities_V = (logits_V / max(sampling.temperature, COLDEST)).softmax(-1).cpu()
    return int(torch.multinomial(_cut(probabilities_V, sampling), 1, generator=generator))


def _cut(probabilities_V: Tensor, sampling: Sampling) -> Tensor:
    """The same with zeros where nothing may be drawn; not normalised again."""
    if sampling.top_k <= 0 and sampling.top_p >= 1 and sampling.min_p <= 0:
        return probabilities_V
    ranked_V, order_V = probabilities_V.sort(descending=True, stable=True)
    if sampling.top_k > 0:
        ranked_V[sampling.top_k :] = 0
    if sampling.top_p < 1:
        # What the likelier ones leave out; the likeliest itself always stays.
        reached_V = ranked_V.cumsum(-1) >= sampling.top_p * ranked_V.sum()
        ranked_V[1:][reached_V[:-1]] = 0
    ranked_V[ranked_V < sampling.min_p * ranked_V[0]] = 0
    return torch.zeros_like(probabilities_V).scatter_(0, order_V, ranked_V)


@torch.no_grad()
def draws(
    model: PreTrainedModel, ids_1T: Tensor, *, tokens: int, sampling: Sampling, acting: Callable[[], AbstractContextManager] = nullcontext
) -> Iterator[Draw]:
    """Tokens behind a prompt, exactly ``tokens`` unless whoever reads them stops.

    ``acting`` is entered for each step alone: whoever reads the tokens runs between them, and may never ask for the next.
    """
    generator, cache = torch.Generator().manual_seed(sampling.seed), new_cache(model)
    for _ in range(tokens):
        with acting():
            logits_V = step(model, ids_1T, cache)[0]
        token = draw(logits_V, sampling, generator)
        yield Draw(token, logits_V)
        ids_1T = torch.tensor([[token]], device=ids_1T.device)


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
    """Ids of :func:`draws`, at most ``tokens``, up to one of ``ends`` (left out)."""
    for token, _ in draws(model, ids_1T, tokens=tokens, sampling=Sampling(temperature, seed=seed), acting=acting):
        if token in ends:
            return
        yield token


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
