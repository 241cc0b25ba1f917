"""The forms of the answers: whole ones, and server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from limbeck.serve.openai.backend import Likely, Piece, TokenScore, Usage
from limbeck.serve.openai.questions import Question

DONE = b"data: [DONE]\n\n"


class Form:
    """How one answer is written: an id, a time, and OpenAI's fields for a chat or a plain completion."""

    def __init__(self, question: Question, model: str):
        self.question = question
        self._chat = question.chat
        self._head = {
            "id": ("chatcmpl-" if self._chat else "cmpl-") + secrets.token_hex(12),
            "object": "",
            "created": int(time.time()),
            "model": model,
        }
        self._written = 0
        self._begun = False
        # What a whole answer is gathered from.
        self._text: list[str] = []
        self._scores: list[TokenScore] = []
        self._more: dict[str, Any] = {}

    def event(self, piece: Piece) -> bytes:
        """A piece as one event; with its finish, and then the usage where it was asked for."""
        choice: dict[str, Any]
        if self._chat:
            delta: dict[str, Any] = {} if self._begun else {"role": "assistant", "content": ""}
            if piece.text:
                delta["content"] = piece.text
            choice = {"index": 0, "delta": {**delta, **piece.more}}
        else:
            choice = {"index": 0, "text": piece.text}
        choice |= {"logprobs": self._log_probabilities(piece.scores), "finish_reason": piece.finish}
        self._begun = True
        self._written += len(piece.text)
        name = "chat.completion.chunk" if self._chat else "text_completion"
        chunk = {**self._head, "object": name, "choices": [choice]}
        if not self.question.usage_in_stream:
            return sse(chunk)
        events = sse({**chunk, "usage": None})
        if piece.usage is not None:
            events += sse({**chunk, "choices": [], "usage": _usage(piece.usage)})
        return events

    def gather(self, piece: Piece) -> None:
        """Keep a piece for :meth:`whole`."""
        self._text.append(piece.text)
        self._scores += piece.scores
        for name, value in piece.more.items():
            if name == "tool_calls":
                _merge_calls(self._more.setdefault(name, []), value)
            else:
                self._more[name] = self._more.get(name, "") + value

    def whole(self, last: Piece) -> dict[str, Any]:
        """The answer from all pieces that were gathered."""
        text = "".join(self._text)
        choice: dict[str, Any] = {"index": 0}
        if self._chat:
            silent = not text and "tool_calls" in self._more
            choice["message"] = {"role": "assistant", "content": None if silent else text, **self._more}
        else:
            choice["text"] = text
        choice |= {"logprobs": self._log_probabilities(self._scores), "finish_reason": last.finish}
        name = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": name, "choices": [choice], "usage": None if last.usage is None else _usage(last.usage)}

    def _log_probabilities(self, scores: list[TokenScore] | tuple[TokenScore, ...]) -> dict[str, Any] | None:
        if self.question.logprobs is None:
            return None
        if self._chat:
            return {"content": [{**_likely(s.token), "top_logprobs": [_likely(top) for top in s.top]} for s in scores], "refusal": None}
        offsets, at = [], self._written
        for score in scores:
            offsets.append(at)
            at += len(score.token.text)
        tops = [{top.text: top.log_probability for top in s.top} for s in scores]
        return {
            "tokens": [s.token.text for s in scores],
            "token_logprobs": [s.token.log_probability for s in scores],
            "top_logprobs": tops if self.question.logprobs else None,
            "text_offset": offsets,
        }


def _likely(token: Likely) -> dict[str, Any]:
    data = None if token.data is None else list(token.data)
    return {"token": token.text, "bytes": data, "logprob": token.log_probability}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.written,
        "total_tokens": usage.prompt + usage.written,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def _merge_calls(calls: list[dict[str, Any]], parts: list[Mapping[str, Any]]) -> None:
    """Add the parts of tool calls, as they come in deltas, to the calls."""
    for part in parts:
        at = part.get("index", 0)
        while len(calls) <= at:
            calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call, function = calls[at], part.get("function", {})
        call["id"] = part.get("id") or call["id"]
        for name in ("name", "arguments"):
            call["function"][name] += function.get(name) or ""


def sse(value: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Events as they come; closed to its end even when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes]):
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        # It is not known how long it will be.
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b""})
