"""What every request passes: the bearer token, the counters, and errors turned into replies."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from limbeck.errors import LimbeckError
from limbeck.serve.metrics import Metrics
from limbeck.serve.refusals import Refusal

log = logging.getLogger("limbeck.serve")
CLIENT_GONE = 499
"""Status in the counters for a client that went away before its answer."""


def application(
    routes: Sequence[Route],
    metrics: Metrics,
    *,
    token: str | None,
    open_paths: Collection[str] = (),
    log_every: int = 0,
    say: Callable[[str], None] = log.info,
) -> ASGIApp:
    """An ASGI application whose every error is ``{"error": {"message", "type"}}``.

    ``token`` guards all routes but GET and HEAD of ``open_paths``.  ``say`` gets a line after every ``log_every`` requests (0:
    never).  ``request.scope["limbeck.exit"]`` is an ``ExitStack`` that is unwound when the last byte of the reply is sent.
    """
    paths = sorted({route.path for route in routes})
    known = ", ".join(f"{'|'.join(sorted(route.methods or ()))} {route.path}" for route in routes)

    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return error.reply()

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}; there are {known}"
        return Refusal(error.status_code, message, headers=error.headers).reply()

    gate = Middleware(Gate, metrics=metrics, token=token, open_paths=open_paths, paths=paths, log_every=log_every, say=say)
    return Starlette(routes=list(routes), middleware=[gate], exception_handlers={Refusal: refuse, HTTPException: http_error})


def check_token(token: str | None, variable: str) -> str | None:
    """A token as an environment variable gives it; one that no header can carry is refused."""
    if token is None:
        return None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise LimbeckError(f"{variable} is set to something that is no token (empty, or not plain ASCII without spaces): mend or unset it")
    return token


class Gate:
    """Middleware around the routes; see :func:`application`."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        *,
        token: str | None,
        open_paths: Collection[str],
        paths: Collection[str],
        log_every: int,
        say: Callable[[str], None],
    ):
        self.app = app
        self.metrics = metrics
        self.open_paths, self.paths = frozenset(open_paths), frozenset(paths)
        self.log_every, self.say = log_every, say
        self._token = None if token is None else token.encode()
        self._seen = 0
        self._since = time.monotonic()
        metrics.counter("requests_total", "Requests by route and status.")
        metrics.counter("sent_bytes_total", "Bytes of reply bodies.")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, if it has the token or its path needs none, and count it and the bytes of its reply (ASGI)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif scope["method"] != "HEAD":
                self.metrics.add("sent_bytes_total", len(message.get("body", b"")))
            await send(message)

        try:
            with ExitStack() as scope["limbeck.exit"]:
                self._check(scope)
                await self.app(scope, receive, counted)
        except Refusal as refusal:
            await refusal.reply()(scope, receive, counted)
        except ClientDisconnect:
            status = CLIENT_GONE
        except Exception as error:
            log.exception("%s %s", scope["method"], scope["path"])
            if status:
                # Half a reply is out: only an ended connection tells the client.
                raise
            message = f"the server failed on this request ({type(error).__name__}); its log says where"
            await Refusal(500, message).reply()(scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.add("requests_total", path=path, status=str(status or CLIENT_GONE))
            self._tell()

    def _check(self, scope: Scope) -> None:
        if self._token is None or (scope["method"] in ("GET", "HEAD") and scope["path"] in self.open_paths):
            return
        given = Headers(scope=scope).get("authorization", "")
        scheme, _, word = given.partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(word.strip().encode("latin-1"), self._token):
            found = "another token" if given else "none"
            raise Refusal(
                401, f"this server wants `Authorization: Bearer TOKEN`, and got {found}", headers={"www-authenticate": "Bearer"}
            )

    def _tell(self) -> None:
        self._seen += 1
        if not self.log_every or self._seen % self.log_every:
            return
        now = time.monotonic()
        rate = self.log_every / max(now - self._since, 1e-9)
        sent = self.metrics.total("sent_bytes_total") / 2**20
        self._since = now
        self.say(f"{self._seen} requests, {rate:.1f}/s lately, {sent:.1f} MiB sent")


def exit_stack(scope: Mapping[str, object]) -> ExitStack:
    """The stack of a request that is unwound when its reply is sent."""
    stack = scope["limbeck.exit"]
    assert isinstance(stack, ExitStack)
    return stack
