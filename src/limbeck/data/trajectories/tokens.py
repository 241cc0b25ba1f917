"""Rendered conversations as tokens: which count as targets, and where a conversation may be cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import processors

from limbeck.data.trajectories.render import Rendered
from limbeck.errors import DataError

LEAD = "\n"
"""One token of its own wherever a tokenizer puts a space before a text."""


@dataclass(frozen=True)
class Tokens:
    """One conversation as tokens.

    ``ids_T`` int64; ``spoken_T`` bool, what the assistant says; ``turns_N3`` int64: first token of each assistant turn's header and
    words, and behind the words' last.
    """

    ids_T: np.ndarray
    spoken_T: np.ndarray
    turns_N3: np.ndarray

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.ids_T)


def tokenise(tokenizer: Any, rendered: Sequence[Rendered]) -> list[Tokens]:
    """Each text in one piece, its special tokens read as such.

    A token that would cross the beginning or the end of an assistant's words is cut there, as it is when a model is asked to go on
    from the header: what is decoded from the targets is what the assistant says, to the byte.

    Raises:
        DataError: a tokenizer that cannot say where its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError("tokenizer: assistant-only targets need the place of each token in the text, which slow tokenizers do not give: save it as a fast one")
    encoded = _encode(tokenizer, [one.text for one in rendered])
    return [_tokens(tokenizer, one, ids, offsets) for one, (ids, offsets) in zip(rendered, encoded, strict=True)]


def _encode(tokenizer: Any, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids ``[T]``, and the first and the last character of each token, int64 ``[T, 2]``."""
    if not texts:
        return []
    with _untrimmed(tokenizer.backend_tokenizer):
        found = tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
    pairs = []
    for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True):
        bounds = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        # A character that is left out of all offsets belongs to the token behind it.
        before = np.concatenate([[0], np.maximum.accumulate(bounds[:-1, 1])]) if len(bounds) else bounds[:, 0]
        pairs.append((np.array(ids, dtype=np.int64), np.stack([np.minimum(bounds[:, 0], before), bounds[:, 1] - 1], axis=1)))
    return pairs


@contextmanager
def _untrimmed(backend: Any) -> Iterator[None]:
    """Offsets with the white space of a token, which the post-processors of many tokenizers (Llama 3's) leave out of them.

    Without special tokens to add there is nothing else that these do.
    """
    before = backend.post_processor
    if before is not None:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    try:
        yield
    finally:
        if before is not None:
            backend.post_processor = before


def _tokens(tokenizer: Any, rendered: Rendered, ids: np.ndarray, bounds: np.ndarray) -> Tokens:
    first, last = bounds[:, 0], bounds[:, 1]
    edges = np.array([edge for _, start, end in rendered.turns for edge in (start, end)], dtype=np.int64)
    holder = np.searchsorted(last, edges, side="left")
    crossed = edges[(holder < len(ids)) & (first[np.minimum(holder, len(ids) - 1)] < edges)]
    if len(crossed):
        ids, first, last = _in_parts(tokenizer, rendered.text, crossed.tolist())
    spoken = np.zeros(len(ids), dtype=bool)
    turns = []
    for header, start, end in rendered.turns:
        # Tokens are in the order of the text, so the last characters ascend.
        bounds_of = np.searchsorted(last, [header, start, end], side="left")
        spoken[bounds_of[1] : bounds_of[2]] = True
        turns.append(bounds_of)
    return Tokens(ids, spoken, np.array(turns, dtype=np.int64).reshape(-1, 3))


def _in_parts(tokenizer: Any, text: str, cuts: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The text cut at these characters, each part on its own; ids, and the first and last character of each."""
    edges = [0, *cuts, len(text)]
    [(lead, _)] = _encode(tokenizer, [LEAD])
    # SentencePiece begins every text with a space of its own; a part inside of a text has none.
    before = LEAD if len(lead) > 1 else ""
    parts = _encode(tokenizer, [(before if a else "") + text[a:b] for a, b in pairwise(edges)])
    if before:
        parts = [parts[0], *((ids[len(lead) :], bounds[len(lead) :] - len(LEAD)) for ids, bounds in parts[1:])]
    ids = np.concatenate([ids for ids, _ in parts])
    bounds = np.concatenate([found + edge for (_, found), edge in zip(parts, edges[:-1], strict=True)])
    return ids, bounds[:, 0], bounds[:, 1]
