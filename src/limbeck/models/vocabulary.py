"""Vocabularies are compared as token strings, never as sizes.

Two sizes can agree while the tokens differ, and two paddings of one vocabulary (151,936 against 152,064) are the same tokens.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from limbeck.errors import ModelError


def check_vocabulary(tokenizer: Any, model: Any, *, who: str) -> None:
    """Every id that the tokenizer can emit must have a row in the model's embedding."""
    highest = max(tokenizer.get_vocab().values())
    rows = model.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        raise ModelError(
            f"the tokenizer emits ids up to {highest}, and {who} has {rows} embedding rows: use the tokenizer that belongs to "
            f"the model, or build the model with vocab_size >= {highest + 1}"
        )


def vocabulary_digest(tokenizer: Any) -> str:
    """SHA-256 of the token strings in the order of their ids: equal for two tokenizers that mean the same by every id."""
    listed = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def shared_ids(tokenizer: Any, student: Any, teacher: Any) -> int:
    """Number of output rows that student and teacher have in common; what one of them has beyond is padding.

    Heads are padded to different widths for the same tokens (Qwen2.5: 151,936 and 152,064).  That what lies beyond the narrower
    head is padding is checked against the tokens: one that the tokenizer knows must not be lost.
    """
    rows = {who: model.get_output_embeddings().weight.shape[0] for who, model in (("student", student), ("teacher", teacher))}
    narrow = min(rows, key=rows.__getitem__)
    beyond = sorted(index for index in tokenizer.get_vocab().values() if index >= rows[narrow])
    if beyond:
        token = tokenizer.convert_ids_to_tokens(beyond[0])
        raise ModelError(
            f"the {narrow} has {rows[narrow]} output rows, and the tokenizer has {len(beyond)} tokens beyond them (first: id {beyond[0]}, "
            f"{token!r}): the heads cannot be compared; use a {narrow} whose head covers the tokenizer"
        )
    return rows[narrow]


def compare_vocabularies(ours: Any, theirs: Any, *, names: tuple[str, str]) -> None:
    """Refuse two tokenizers whose common ids are not the same token strings; a longer tail on their side is allowed."""
    a, b = ({index: token for token, index in tokenizer.get_vocab().items()} for tokenizer in (ours, theirs))
    different = sorted(index for index in a.keys() & b.keys() if a[index] != b[index])
    missing = sorted(a.keys() - b.keys())
    if different or missing:
        lines = [f"id {i}: {a[i]!r} in {names[0]}, {b.get(i, '(none)')!r} in {names[1]}" for i in (different + missing)[:5]]
        raise ModelError(
            f"{names[0]} and {names[1]} have different vocabularies ({len(different)} ids differ, {len(missing)} are missing): "
            + "; ".join(lines)
            + ". Prepare the data with the teacher's own tokenizer, or choose a teacher of the same vocabulary"
        )
