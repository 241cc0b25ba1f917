"""An ASGI application on a loopback port, for the length of a test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from integration.faults import App
from limbeck.serve.process import BACKLOG, Server, bind, server, url_of


class Serving:
    """A server in a thread.  ``url`` is known and connections are taken from the first moment on."""

    def __init__(self, app: App, *, port: int = 0, grace: float = 5, stopping: Callable[[], None] = lambda: None):
        self._sock = bind("127.0.0.1", port)
        self._sock.listen(BACKLOG)
        self.url = url_of(self._sock)
        self.port = int(self.url.rsplit(":", 1)[1])
        self.server: Server = server(app, stopping=stopping, grace=grace)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._sock]}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """As SIGTERM does: no more connections, and what runs is answered."""
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server did not stop"


@contextmanager
def serving(app: App, *, grace: float = 5, stopping: Callable[[], None] = lambda: None) -> Iterator[str]:
    """The URL of a served application."""
    running = Serving(app, grace=grace, stopping=stopping)
    try:
        yield running.url
    finally:
        running.stop()


@contextmanager
def asking(url: str, **options: Any) -> Iterator[httpx2.Client]:
    """A client that waits as long as a busy machine may need."""
    with httpx2.Client(base_url=url, trust_env=False, verify=False, timeout=60, **options) as client:
        yield client


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Return when it is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)
