"""What stands between the HTTP side and whoever writes: pieces of text, and a client that may go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from limbeck.serve.admission import closing
from limbeck.serve.openai.questions import Question
from limbeck.serve.worker import disconnected

T = TypeVar("T")


@dataclass(frozen=True)
class Likely:
    """A token's text, its bytes (None for a part of a character that only its neighbours complete) and its log-probability in nats."""

    text: str
    data: tuple[int, ...] | None
    log_probability: float


@dataclass(frozen=True)
class TokenScore:
    """A written token, and the likeliest at its place, the likeliest first.  Of the model's own distribution, before any sampling."""

    token: Likely
    top: tuple[Likely, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of a prompt, those of it that had been read before, and those written."""

    prompt: int
    written: int
    cached: int = 0


@dataclass(frozen=True)
class Piece:
    """Some text; the last piece has ``finish`` (stop, length, tool_calls) and ``usage``.

    ``more`` are fields of a chat answer besides its text, in OpenAI's form of a delta: ``tool_calls``, ``reasoning_content``.
    """

    text: str = ""
    scores: tuple[TokenScore, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)
    finish: str | None = None
    usage: Usage | None = None


class Caller:
    """The client of one request: waiting for anything ends as soon as it is gone, or the server must stop (``cut``)."""

    def __init__(self, receive: Receive, cut: asyncio.Event):
        self._over = [asyncio.ensure_future(disconnected(receive)), asyncio.ensure_future(cut.wait())]
        self._cut = cut

    async def wait_for(self, something: Awaitable[T]) -> T:
        """What it comes to.  Raises ``ClientDisconnect`` for a client that is gone, and :class:`Refusal` (503) when cut."""
        task = asyncio.ensure_future(something)
        try:
            await asyncio.wait([task, *self._over], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise self.end()
        finally:
            task.cancel()

    async def receive(self) -> Message:
        """ASGI's ``receive`` for whoever waits for the end of the client alone."""
        await asyncio.wait(self._over, return_when=asyncio.FIRST_COMPLETED)
        return {"type": "http.disconnect"}

    def end(self) -> Exception:
        """Why nothing more is to be written."""
        return closing() if self._cut.is_set() else ClientDisconnect()

    def close(self) -> None:
        """Watch no longer."""
        for task in self._over:
            task.cancel()


class Backend(Protocol):
    """Whoever writes."""

    name: str
    """Of the model, on the wire."""
    context: int
    """Tokens of a prompt and its answer together."""
    takes: frozenset[str]
    """Fields of a request beyond those that all backends know (:data:`limbeck.serve.openai.questions.EXTRA`)."""

    def pieces(self, question: Question, caller: Caller) -> AsyncGenerator[Piece]:
        """The answer, to its last piece.  Raises :class:`Refusal` for what cannot be answered, before the first piece.

        Closing the generator, or a client that goes away, ends the writing: when ``aclose`` returns nothing runs any more.
        """
        ...

    def close(self, seconds: float) -> bool:
        """Let go of the model; False if something still runs in it after so many seconds."""
        ...
