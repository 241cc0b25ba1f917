"""Continuations of the same prompts by each model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck.config.parts.stages import SampleOptions
from limbeck.data.dataset import TokenRows
from limbeck.evaluation.decode import decode
from limbeck.evaluation.perplexity import whole_documents


def default_prompts(rows: TokenRows, tokenizer: PreTrainedTokenizerBase, *, count: int = 3, tokens: int = 24) -> list[str]:
    """Beginnings of held-out texts: the first that start inside a row and are longer than the prompt."""
    prompts: list[str] = []
    fallback: list[str] = []
    for index in range(min(len(rows), 256)):
        batch = rows.batch([index])
        ids_T, documents_T, whole_T = batch.input_ids_BT[0], batch.documents_BT[0], whole_documents(batch)[0]
        fallback.append(_text(ids_T[documents_T == 0][:tokens].tolist(), tokenizer))
        for document in range(1, int(documents_T.max()) + 1):
            piece = ids_T[(documents_T == document) & whole_T].tolist()
            if len(piece) > tokens:
                prompts.append(_text(piece[:tokens], tokenizer))
                break
        if len(prompts) == count:
            break
    # Documents longer than a row never begin inside one that we looked at: then rows begin the prompts.
    return [text for text in (prompts + fallback) if text.strip()][:count]


def _text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Token ids that end a text: those of the model, which may have several, and the tokenizer's."""
    ids = model.generation_config.eos_token_id if model.generation_config is not None else model.config.eos_token_id
    return {*(ids if isinstance(ids, list | tuple) else [ids]), tokenizer.eos_token_id} - {None}


@torch.no_grad()
def continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The text that a model puts after a prompt: greedy at temperature 0, else sampled.

    Sampling draws from a generator of its own, on the CPU: it moves no global random state, and two models meet the same draws.
    """
    ids_1T = torch.tensor([tokenizer.encode(prompt)], device=model.device)
    return _text(list(decode(model, ids_1T, tokens=tokens, ends=end_ids(model, tokenizer), temperature=temperature, seed=seed)), tokenizer)


def samples(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    options: SampleOptions,
    *,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """``[{"prompt": ..., "continuations": {model: text}}]``; every model meets the same draws."""
    return [
        {
            "prompt": prompt,
            "continuations": {
                name: continuation(
                    model, tokenizer, prompt, tokens=options.tokens, temperature=options.temperature, seed=seed + i
                )
                for name, model in models.items()
            },
        }
        for i, prompt in enumerate(prompts)
    ]
