"""A server process: a socket, signals, and an end that loses nothing that runs."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from limbeck.errors import RunError

BACKLOG = 1024
KEEP_ALIVE = 75
"""Seconds for which an idle connection stays open: longer than a training step, so that clients find theirs open."""
HEAD_SECONDS = 60.0
"""Until the head of a request must have arrived."""
_CLOSING = 5.0
"""Seconds beyond the grace time for a server in a thread to come to its end."""


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet; port 0 takes a free one.  Raises :class:`RunError`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise RunError(
            f"--host {host}: no such address here ({error.strerror or error}): 127.0.0.1 is this machine alone, 0.0.0.0 every address "
            "of it"
        ) from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _taken(f"{host}:{port}", error) from error
    return sock


def _taken(place: str, error: OSError) -> RunError:
    return RunError(f"{place} cannot be listened on ({error.strerror or error}): choose another --port (0 takes a free one) or --host")


def refuse_strangers(sock: socket.socket, token: str | None, variable: str) -> None:
    """Raises :class:`RunError` for an address that other machines reach and no token that they would have to know."""
    if token is None and not ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback:
        where = url_of(sock)
        sock.close()
        raise RunError(
            f"{where} is reached from other machines, and whoever reaches it could use this server: put a token into {variable} (clients send "
            "`Authorization: Bearer TOKEN`), or leave --host out to listen on 127.0.0.1 alone"
        )


def url_of(sock: socket.socket) -> str:
    """``http://HOST:PORT`` of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Connection(H11Protocol):
    """uvicorn's, which waits for the rest of a request's head for ever, with an end to that."""

    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A head must come now."""
        super().connection_made(transport)
        self._mind_head()

    def data_received(self, data: bytes) -> None:
        """Part of a head, or the rest of it."""
        super().data_received(data)
        self._mind_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        super().connection_lost(exc)
        if self._head is not None:
            self._head.cancel()

    def _mind_head(self) -> None:
        waits = self.conn.their_state is h11.IDLE
        if waits and self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        elif not waits and self._head is not None:
            self._head.cancel()
            self._head = None


class Server(uvicorn.Server):
    """uvicorn, with ``stopping`` called as soon as it takes no more connections."""

    def __init__(self, config: uvicorn.Config, stopping: Callable[[], None]):
        super().__init__(config)
        self._stopping = stopping

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End of taking connections; what was taken is answered within the grace time."""
        self._stopping()
        await super().shutdown(sockets)


def server(app: ASGIApp, *, stopping: Callable[[], None], grace: float) -> Server:
    """A server that is not running yet.  ``grace`` is in seconds."""
    return Server(
        uvicorn.Config(
            app,
            http=Connection,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=max(1, round(grace)),
        ),
        stopping,
    )


class Served:
    """A loaded model behind a bound address, ``url``, at which nobody listens yet.

    As a context manager it listens in a thread of this process and ends with the block; :meth:`forever` listens in this thread until
    SIGTERM or Ctrl-C.  Either way what runs is answered within ``grace`` seconds, and the address is free afterwards.
    """

    def __init__(
        self, app: ASGIApp, sock: socket.socket, *, name: str, stopping: Callable[[], None], release: Callable[[float], bool], grace: float
    ):
        """``name`` is what the model is called.  ``stopping`` is called when no more connections are taken, ``release`` (seconds to wait) lets go
        of the model at the end and says whether all that ran has ended."""
        self.name, self.url = name, url_of(sock)
        self._sock, self._release = sock, release
        self._server = server(app, stopping=stopping, grace=grace)
        self._grace = grace
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Served:
        """Listen; connections are taken when this returns."""
        try:
            self._listen()
        except BaseException:
            self.close()
            raise
        # uvicorn takes signals over in the main thread alone.
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._sock]}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._thread is not None
        self._server.should_exit = True
        self._thread.join(self._grace + _CLOSING)
        self.close()

    def forever(self, announce: Callable[[], None] = lambda: None) -> bool:
        """Serve until SIGTERM or SIGINT, then return whether all that ran has ended; ``announce`` is called when connections are taken."""

        def stop(_: int, __: FrameType | None) -> None:
            self._server.should_exit = True

        # uvicorn puts these back when it is done and raises the signal again, which must then do nothing.
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._listen()
            announce()
            self._server.run(sockets=[self._sock])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            ended = self.close()
        return ended

    def close(self) -> bool:
        """Give the address back and let go of the model; False if something of it still runs after a second."""
        self._sock.close()
        return self._release(1)

    def _listen(self) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        try:
            self._sock.listen(BACKLOG)
        except OSError as error:
            # Two that are started together may both have bound it.
            raise _taken(self.url, error) from error
