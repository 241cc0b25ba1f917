"""Faults of a served teacher, injected in front of any ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import re
import socket
import struct
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

KINDS = ("500", "429", "reset", "stall", "truncated", "cut", "wrong_k", "nan")


class FaultyApp:
    """Passes requests on to ``app``, and spoils a share ``rate`` of the POST requests, by a fault drawn from ``kinds``.

    * ``500``, ``429`` (with ``Retry-After: retry_after``): the application is not asked
    * ``reset``: the connection is reset before a byte of the answer
    * ``stall``: no byte for ``stall_seconds``, then a reset
    * ``truncated``: a well-formed HTTP answer with the first half of the body (what a bad proxy does)
    * ``cut``: half of the promised body, then the connection ends
    * ``wrong_k``, ``nan``: an answer that is whole and wrong; limbeck frames get a true checksum.  Formats that it does not know
      are spoilt by ``spoil[kind](body)`` if given, else as text: the last number of every innermost list is lost, the first
      number with a point becomes NaN.

    Draws come from ``seed`` in the order in which requests arrive; ``requests`` and ``injected`` count.
    """

    def __init__(
        self,
        app: App,
        rate: float = 0.1,
        kinds: Sequence[str] = KINDS,
        seed: int = 0,
        *,
        stall_seconds: float = 30.0,
        retry_after: float = 0.0,
        spoil: dict[str, Callable[[bytes], bytes]] | None = None,
    ):
        unknown = set(kinds) - set(KINDS)
        if unknown:
            raise ValueError(f"unknown faults {sorted(unknown)}; known: {', '.join(KINDS)}")
        self.app, self.rate, self.kinds = app, rate, tuple(kinds)
        self.stall_seconds, self.retry_after = stall_seconds, retry_after
        self.spoil = {"wrong_k": fewer, "nan": with_nan, **(spoil or {})}
        self.requests = 0
        self.injected: Counter[str] = Counter()
        self._rng = random.Random(seed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        self.requests += 1
        # Two draws a request, so that the faults that are drawn do not depend on those that were.
        draw, kind = self._rng.random(), self._rng.choice(self.kinds)
        if draw >= self.rate:
            await self.app(scope, receive, send)
            return
        self.injected[kind] += 1
        if kind in ("500", "429"):
            body = json.dumps({"error": {"message": f"injected {kind}", "type": "injected"}}).encode()
            headers = [(b"retry-after", f"{self.retry_after:g}".encode())] if kind == "429" else []
            await _read(receive)
            await _answer(send, int(kind), body, [*headers, (b"content-type", b"application/json")])
        elif kind in ("reset", "stall"):
            await _read(receive)
            if kind == "stall":
                await _stall(receive, self.stall_seconds)
            _reset(send)
        else:
            await self._spoilt(kind, scope, receive, send)

    async def _spoilt(self, kind: str, scope: Scope, receive: Receive, send: Send) -> None:
        plain = {**scope, "headers": [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]}
        start: Message = {}
        chunks: list[bytes] = []

        async def keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                chunks.append(message.get("body", b""))

        await self.app(plain, receive, keep)
        body = b"".join(chunks)
        headers = [(name, value) for name, value in start["headers"] if name != b"content-length"]
        if kind == "cut":
            length = (b"content-length", str(len(body)).encode())
            await send({"type": "http.response.start", "status": start["status"], "headers": [*headers, length]})
            await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
            await asyncio.sleep(0.01)
            _reset(send, hard=False)
            return
        if start["status"] == 200:
            body = body[: len(body) // 2] if kind == "truncated" else self.spoil[kind](body)
        await _answer(send, start["status"], body, headers)


def fewer(body: bytes) -> bytes:
    """An answer with one id fewer a row than was asked for."""
    if body[:4] != b"LMBK":
        return re.sub(rb",\s*[^][,{}:]+\]", b"]", body)
    header, columns = _parted(body)
    rows, k = sum(header["rows"]), header["k"]
    values = 4 if header["values"] == "float32" else 2

    def cut(column: bytes, size: int) -> bytes:
        return b"".join(column[row * k * size : (row * k + k - 1) * size] for row in range(rows))

    ids, logits = columns[: rows * k * 4], columns[rows * k * 4 : rows * k * (4 + values)]
    rest = columns[rows * k * (4 + values) :]
    return _joined(header | {"k": k - 1}, cut(ids, 4) + cut(logits, values) + rest)


def with_nan(body: bytes) -> bytes:
    """An answer with a number that is none."""
    if body[:4] != b"LMBK":
        return re.sub(rb"-?\d+\.\d+(e-?\d+)?", b"NaN", body, count=1)
    header, columns = _parted(body)
    place = sum(header["rows"]) * header["k"] * 4
    number = struct.pack("<f" if header["values"] == "float32" else "<e", math.nan)
    return _joined(header, columns[:place] + number + columns[place + len(number) :])


def _parted(frame: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack_from("<4sHI", frame)[2]
    return json.loads(frame[10 : 10 + length]), frame[10 + length : -4]


def _joined(header: dict[str, Any], columns: bytes) -> bytes:
    text = json.dumps(header).encode()
    body = struct.pack("<4sHI", b"LMBK", 1, len(text)) + text + columns
    return body + struct.pack("<I", zlib.crc32(body))


async def _read(receive: Receive) -> None:
    while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
        pass


async def _stall(receive: Receive, seconds: float) -> None:
    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(gone(), seconds)


async def _answer(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


def _reset(send: Send, *, hard: bool = True) -> None:
    """End the connection under uvicorn's request cycle; ASGI has no message for it, so elsewhere it is an exception."""
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    if transport is None:
        raise ConnectionResetError("injected")
    if hard:
        # Without lingering a close is a reset on the wire.
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()
