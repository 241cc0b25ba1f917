"""Messages -> the text of a chat template, and where in it the assistant speaks.

The template renders a conversation twice: as it is, and with a mark in the place of everything that the assistant says.  What stands
between the marks is what the template and the other roles say, so it is found again in the real text, whatever the template
is.  Its own text is never put together by us.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import jinja2

from limbeck.data.trajectories.trajectory import Unusable
from limbeck.errors import DataError

USER, ASSISTANT = "\ue0f0user\ue0f1", "\ue0f0assistant\ue0f1"
"""Words of the private-use area: no text holds them, and no template strips them."""
REFUSALS = (jinja2.TemplateError, TypeError, AttributeError, LookupError, ValueError, ArithmeticError)
"""A template is a program: what it makes of a conversation that it does not expect is not for us to foresee."""


@dataclass(frozen=True)
class Rendered:
    """One conversation as text.

    ``turns``: ``(header, start, end)`` of every assistant turn: where its header begins (a conversation may be cut there), where
    its words begin, and where they end, the mark of the turn's end included.
    """

    text: str
    turns: tuple[tuple[int, int, int], ...]


class ChatTemplate:
    """A chat template of a tokenizer, and how an assistant's turn begins and ends in it."""

    def __init__(self, tokenizer: Any, template: str | None = None):
        """``template`` is Jinja text; by default the tokenizer's own.

        Raises:
            DataError: there is none, it is no Jinja, or it does not write what an assistant says.
        """
        self.tokenizer = tokenizer
        found = template if template is not None else getattr(tokenizer, "chat_template", None)
        if isinstance(found, dict):
            found = found.get("tool_use", found.get("default"))
        if not found:
            raise DataError("template: the tokenizer has no chat template: name a .jinja file, the one that teacher and student are served with")
        self.source: str = found
        user, words = {"role": "user", "content": USER}, {"role": "assistant", "content": ASSISTANT}
        try:
            alone, asked = self.text([user]), self.text([user], generation=True)
            answered, followed = self.text([user, words]), self.text([user, words, user])
        except REFUSALS as error:
            raise DataError(f"template: cannot render a user's and an assistant's turn ({type(error).__name__}: {error})") from error
        for written in (answered, followed):
            if (count := written.count(ASSISTANT)) != 1:
                raise DataError(f"template: an assistant's words stand {count} times in what it writes, once is needed: is it a chat template?")
        before, after = answered.split(ASSISTANT)
        # What is written before an answer is asked for, without what only a fresh answer or the last one gets (an opening <think>).
        begins = [text[len(_common(alone, text)) :] for text in (before, followed.split(ASSISTANT)[0])]
        header = _common(*begins)
        self.header = _common(asked[len(_common(alone, before)) :], header) or header
        self.closing = after.rstrip()

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the template's text."""
        return hashlib.sha256(self.source.encode()).hexdigest()[:16]

    def text(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, *, generation: bool = False) -> str:
        """What the template writes, byte for byte."""
        return self.tokenizer.apply_chat_template(
            messages, tools=tools or None, chat_template=self.source, tokenize=False, add_generation_prompt=generation
        )

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> Rendered:
        """A conversation and its assistant turns.

        Raises:
            Unusable: the template refuses it, or writes something else for it than for the same with other words of the assistant.
        """
        self._check_marks(messages)
        try:
            text, skeleton = self.text(messages, tools), self.text(_marked(messages), tools)
        except REFUSALS as error:
            raise Unusable("template", f"the chat template refuses it ({type(error).__name__}: {error})") from error
        return Rendered(text, tuple(self._turns(text, skeleton)))

    def _turns(self, text: str, skeleton: str) -> list[tuple[int, int, int]]:
        pieces = self._pieces(skeleton)
        if not text.startswith(pieces[0]):
            raise Unusable("template", "the beginning is rendered differently when the assistant says something else")
        starts, ends = [len(pieces[0])], []
        for number, piece in enumerate(pieces[1:], 1):
            last = number == len(pieces) - 1
            at = len(text) - len(piece) if last else text.find(piece, starts[-1])
            if at < starts[-1] or not text.startswith(piece, at):
                raise Unusable("template", f"what follows assistant turn {number} is rendered differently when the assistant says something else")
            ends.append(at + len(self.closing))
            starts.append(at + len(piece))
        self._check_only(text, pieces, starts)
        return [(start - len(self.header), start, end) for start, end in zip(starts[:-1], ends, strict=True)]

    def _check_only(self, text: str, pieces: list[str], starts: list[int]) -> None:
        """Turns that are found in another place from the end on than from the beginning are told apart by nothing."""
        at = len(text)
        for number in range(len(pieces) - 1, 0, -1):
            piece = pieces[number]
            # The last piece ends the text, and each other one must begin where the words behind it leave room.
            at = at - len(piece) if number == len(pieces) - 1 else text.rfind(piece, 0, at)
            if at + len(piece) != starts[number]:
                raise Unusable("template", f"the words of assistant turn {number} or {number + 1} could be the end of one and the beginning of the other")

    def _pieces(self, skeleton: str) -> list[str]:
        """What the template writes before, between and after the assistant's words; each piece but the last ends with a header."""
        pieces, rest = [], skeleton
        number = 0
        while (mark := _mark(number)) in rest:
            before, rest = rest.split(mark, 1)
            cut = before.rfind(self.header)
            if cut < 0 or mark in rest or (number and not before.startswith(self.closing)):
                raise Unusable("template", f"assistant turn {number + 1} does not begin and end as one in a conversation of two turns does")
            pieces.append(before[: cut + len(self.header)])
            number += 1
        if not rest.startswith(self.closing):
            raise Unusable("template", "the last assistant turn does not end as one in a conversation of two turns does")
        return [*pieces, rest]

    def _check_marks(self, messages: list[dict[str, Any]]) -> None:
        """Text that spells a special token would become that token, and look like a turn."""
        special = [token for token in self.tokenizer.all_special_tokens if token in self.header or token in self.closing]
        for number, message in enumerate(messages):
            words = _strings(message)
            for token in special:
                if any(token in word for word in words):
                    raise Unusable("special token in text", f"turn {number} ({message['role']}) spells {token}")


def _common(a: str, b: str) -> str:
    """What two texts begin with."""
    return "".join(x for x, _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _mark(number: int) -> str:
    return f"\ue0f0{number}\ue0f1"


def _marked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with a mark in the place of each assistant turn's words and calls."""
    number, marked = 0, []
    for message in messages:
        if message["role"] == "assistant":
            message = {"role": "assistant", "content": _mark(number)}
            number += 1
        marked.append(message)
    return marked


def _strings(tree: Any) -> list[str]:
    if isinstance(tree, str):
        return [tree]
    children = [*tree, *tree.values()] if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [word for child in children for word in _strings(child)]
