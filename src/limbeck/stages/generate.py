"""`limbeck generate`: text from a run or a model folder, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from limbeck.errors import RunError
from limbeck.models.loading import load_model, load_tokenizer, resolve_source


@torch.no_grad()
def generate_text(path: str, prompt: str, *, tokens: int = 128, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
    """Continue a prompt; yields text as it is decoded.  ``temperature`` 0 is greedy."""
    folder = Path(path) / "model" if (Path(path) / "model").is_dir() else path
    source = resolve_source(str(folder))
    model, tokenizer = load_model(source), load_tokenizer(source)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        if tokenizer.bos_token_id is None:
            raise RunError("the prompt is empty and the tokenizer has no beginning-of-text token: give --prompt")
        ids = torch.tensor([[tokenizer.bos_token_id]])
    ends = model.generation_config.eos_token_id
    stop = set(ends if isinstance(ends, list) else [ends])
    generator = torch.Generator().manual_seed(seed)
    cache = model.new_cache() if hasattr(model, "new_cache") else None
    written: list[int] = []
    shown = ""
    for _ in range(tokens):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        logits_V = output.logits[0, -1].float()
        if temperature > 0:
            token = int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))
        else:
            token = int(logits_V.argmax())
        if token in stop:
            break
        written.append(token)
        text = tokenizer.decode(written, skip_special_tokens=True)
        # A token may end inside a character; it is held back until the character is whole.
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
        ids = torch.tensor([[token]])
