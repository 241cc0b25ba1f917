"""The routes of ``limbeck serve``.

==============================  =====================================================================================
``POST /v1/chat/completions``   OpenAI's chat completions, whole or as server-sent events
``POST /v1/completions``        the same for a plain prompt: a string, or token ids
``GET /v1/models``              the one model, as OpenAI's API lists it
``GET /health``                 status, model, limits; without a key
``GET /metrics``                Prometheus text
``GET /``                       a few words, without a key
==============================  =====================================================================================

Errors are ``{"error": {"message", "type", "param", "code"}}``: 400 for a field that is wrong and for a prompt beyond the context, 401
without the key, 404 for another model, 413 for a body that is too large, 429 and 503 with ``Retry-After``.  What goes wrong when
text is on its way ends a stream with such an event.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from limbeck import __version__
from limbeck.serve.admission import Admission
from limbeck.serve.bodies import parse_object, read_body
from limbeck.serve.gate import application, exit_stack
from limbeck.serve.metrics import MEDIA_TYPE as METRICS_TYPE
from limbeck.serve.metrics import Metrics
from limbeck.serve.openai.backend import Backend, Caller, Piece
from limbeck.serve.openai.questions import Limits, Question, question
from limbeck.serve.openai.replies import DONE, EventStream, Form
from limbeck.serve.refusals import Refusal

log = logging.getLogger("limbeck.serve")


class House(Admission):
    """Admission, and ``parallel`` places at the model; a request that finds none waits in the order of its coming."""

    def __init__(self, limit: int, parallel: int):
        super().__init__(limit)
        self.parallel = parallel
        self.places = asyncio.Semaphore(parallel)
        self.busy = 0
        self._seconds = 0.0

    def wait(self) -> float:
        """As the last answers went, until all that wait now have a place."""
        return self._seconds * (1 + (self.admitted - self.busy) / self.parallel)

    @asynccontextmanager
    async def place(self, caller: Caller) -> AsyncIterator[None]:
        """A place at the model, as long as it lasts; given back at once when the client is gone."""
        await caller.wait_for(self.places.acquire())
        self.busy += 1
        start = time.monotonic()
        try:
            yield
        finally:
            self.busy -= 1
            self.places.release()
            seconds = time.monotonic() - start
            self._seconds = seconds if not self._seconds else 0.8 * self._seconds + 0.2 * seconds


class OpenAiService:
    """A backend behind :attr:`app`.

    ``parallel`` answers are written at once, ``queue`` bounds the requests under way (those that wait for a place included).
    ``max_tokens`` bounds an answer, ``max_body`` the bytes of a request.  After :meth:`stop` what runs has ``grace`` seconds.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        vocabulary: int,
        parallel: int = 4,
        queue: int = 64,
        max_tokens: int | None = None,
        max_body: int = 2**20,
        grace: float = 30,
        token: str | None = None,
        log_every: int = 0,
        say: Callable[[str], None] = log.info,
    ):
        self.backend = backend
        self.limits = Limits(backend.name, min(max_tokens or backend.context, backend.context), vocabulary, backend.takes)
        self.house = House(queue, parallel)
        self.max_body, self.grace = max_body, grace
        self._cut = asyncio.Event()
        self.metrics = Metrics()
        self._declare()
        routes = [
            Route("/", self.root),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/v1/models", self.models),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        self.app: ASGIApp = application(
            routes, self.metrics, token=token, open_paths=("/", "/health"), log_every=log_every, say=say
        )

    def _declare(self) -> None:
        self.metrics.counter("prompt_tokens_total", "Tokens of prompts that were answered.")
        self.metrics.counter("written_tokens_total", "Tokens of answers.")
        self.metrics.counter("cancelled_total", "Answers that their client did not wait for.")
        self.metrics.summary("first_piece_seconds", "Seconds from a request's place at the model to its first piece.")
        self.metrics.summary("answer_seconds", "Seconds from a request's place at the model to its last piece.")
        self.metrics.gauge("requests_under_way", "Requests waiting, in work or being sent.", lambda: self.house.admitted)
        self.metrics.gauge("places_taken", "Answers that are being written.", lambda: self.house.busy)

    def stop(self) -> None:
        """Take no more requests; called in the event loop.  What runs goes on, and is cut when the grace time is over."""
        self.house.closed = True
        asyncio.get_running_loop().call_later(self.grace, self._cut.set)

    async def root(self, _: Request) -> Response:
        """Enough for a browser or ``curl``."""
        return PlainTextResponse(f"limbeck {__version__} serves {self.backend.name}: POST /v1/chat/completions, GET /health\n")

    async def health(self, _: Request) -> Response:
        """Whether it takes requests, and its limits."""
        return JSONResponse(
            {
                "status": "closing" if self.house.closed else "ok",
                "model": self.backend.name,
                "context": self.backend.context,
                "max_tokens": self.limits.max_tokens,
                "max_body": self.max_body,
                "parallel": self.house.parallel,
                "places_taken": self.house.busy,
                "requests_under_way": self.house.admitted,
                "version": __version__,
            }
        )

    async def models(self, _: Request) -> Response:
        """OpenAI's list of models: this one."""
        model = {"id": self.backend.name, "object": "model", "created": 0, "owned_by": "limbeck", "context_length": self.backend.context}
        return JSONResponse({"object": "list", "data": [model]})

    async def show_metrics(self, _: Request) -> Response:
        """Prometheus text."""
        return Response(self.metrics.text(), media_type=METRICS_TYPE)

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        return await self._answer(request, chat=True)

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        return await self._answer(request, chat=False)

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        stack = exit_stack(request.scope)
        stack.enter_context(self.house.admission())
        body = await read_body(request, self.max_body, way_out="send less text (--max-body)")
        asked = question(parse_object(body), self.limits, chat=chat)
        caller = Caller(request.receive, self._cut)
        stack.callback(caller.close)
        form = Form(asked, self.backend.name)
        if asked.stream:
            events = self._events(form, asked, caller)
            # What is refused is refused by its status, before a stream begins.
            first = await anext(events)
            return EventStream(_after(first, events))
        async with aclosing(self._pieces(asked, caller)) as pieces:
            async for piece in pieces:
                form.gather(piece)
        return JSONResponse(form.whole(piece))

    async def _events(self, form: Form, asked: Question, caller: Caller) -> AsyncGenerator[bytes]:
        begun = False
        try:
            async with aclosing(self._pieces(asked, caller)) as pieces:
                async for piece in pieces:
                    event = form.event(piece)
                    begun = True
                    yield event
        except ClientDisconnect:
            raise
        except Exception as error:
            if not begun:
                raise
            if not isinstance(error, Refusal):
                log.exception("an answer broke off")
                error = Refusal(500, f"the server failed on this request ({type(error).__name__}); its log says where")
            yield b"data: " + bytes(error.reply().body) + b"\n\n"
        yield DONE

    async def _pieces(self, asked: Question, caller: Caller) -> AsyncGenerator[Piece]:
        """The backend's pieces from a place at the model, counted."""
        try:
            async with self.house.place(caller), aclosing(self.backend.pieces(asked, caller)) as pieces:
                start, first = time.monotonic(), True
                async for piece in pieces:
                    if first:
                        self.metrics.observe("first_piece_seconds", time.monotonic() - start)
                        first = False
                    if piece.usage is not None:
                        self.metrics.add("prompt_tokens_total", piece.usage.prompt)
                        self.metrics.add("written_tokens_total", piece.usage.written)
                        self.metrics.observe("answer_seconds", time.monotonic() - start)
                    yield piece
        except ClientDisconnect:
            self.metrics.add("cancelled_total")
            raise


async def _after(first: bytes, events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event

