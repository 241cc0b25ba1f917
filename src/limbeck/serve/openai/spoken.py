"""Token ids as text that may be shown: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from limbeck.serve.openai.backend import Piece, TokenScore

BROKEN = "\ufffd"
"""What a decoder writes for a part of a character."""
PATIENCE = 8
"""Tokens after which bytes that make no character are shown as what they are."""
BEFORE = 4
"""Last tokens of a prompt with which the first of an answer are decoded: some tokenizers take the space from what begins a text."""


class Spoken:
    """Takes tokens and gives out the text that is certain.

    Text that may be the beginning of a stop string is held back until it is clear that it is not; with a stop string the text ends
    before it.  Scores of tokens go out with the last of their text, and those of a stop string's tokens never do.  ``prompt`` are the
    ids before the first of them.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # Ids before ``_first`` are decoded and forgotten; those up to ``_read`` are decoded again as the context of the next ones.
        self._first, self._ids = 0, list(prompt[-BEFORE:])
        if self._decode(0, len(self._ids)).endswith(BROKEN):
            self._ids.clear()
        self._read = len(self._ids)
        self._held = ""
        self._out = 0
        self._scores: list[tuple[int, TokenScore]] = []
        self.stopped = False

    def add(self, token: int, score: TokenScore | None = None) -> Piece:
        """One more token, and what may be shown now; :attr:`stopped` says that a stop string has ended it."""
        self._ids.append(token)
        text = self._decode(self._first, len(self._ids))
        known = self._decode(self._first, self._read)
        # A token may end inside a character; it is held back until the character is whole.
        if len(text) > len(known) and (not text.endswith(BROKEN) or len(self._ids) - self._read > PATIENCE):
            self._held += text[len(known) :]
            self._first, self._read = self._read, len(self._ids)
        if score is not None:
            self._scores.append((self._out + len(self._held), score))
        return self._give(self._certain())

    def end(self) -> Piece:
        """The rest, when no more tokens come; half a character at the end is left out."""
        text, known = self._decode(self._first, len(self._ids)), self._decode(self._first, self._read)
        self._held += text[len(known) :].rstrip(BROKEN)
        self._certain()
        return self._give(len(self._held), last=True)

    def _decode(self, first: int, last: int) -> str:
        return self._tokenizer.decode(self._ids[first:last], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _certain(self) -> int:
        """How many of the held characters may be shown; cuts them at a stop string."""
        found = [at for at in (self._held.find(word) for word in self._stop) if at >= 0]
        if found:
            self.stopped = True
            self._held = self._held[: min(found)]
            return len(self._held)
        for at in range(max(0, len(self._held) - max(map(len, self._stop), default=1) + 1), len(self._held)):
            if any(word.startswith(self._held[at:]) for word in self._stop):
                return at
        return len(self._held)

    def _give(self, count: int, *, last: bool = False) -> Piece:
        text, self._held = self._held[:count], self._held[count:]
        self._out += count
        if last and not self.stopped:
            gone = len(self._scores)
        else:
            # A token whose text is still held, or of whose text nothing was ever shown because a stop string cut it, stays.
            gone = next((i for i, (ends, _) in enumerate(self._scores) if ends > self._out), len(self._scores))
        scores, self._scores = self._scores[:gone], self._scores[gone:]
        return Piece(text, tuple(score for _, score in scores))
