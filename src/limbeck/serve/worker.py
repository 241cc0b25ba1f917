"""One thread for the model, and how many requests may be in the house at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from limbeck.serve.refusals import Refusal, retry_after

T = TypeVar("T")


class Worker:
    """Does jobs one after the other, in the order in which they came, in a thread of its own.

    ``limit`` bounds the requests that were admitted and are not yet answered to the last byte: waiting, in work or being sent.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.admitted = 0
        self.closed = False
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._seconds = 0.0
        # A thread that is stuck in a forward must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name="limbeck-worker", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that nobody has begun."""
        return len(self._jobs)

    @contextmanager
    def admission(self) -> Iterator[None]:
        """Counts a request in, or refuses it (429); entered and left in the event loop."""
        if self.closed:
            raise _closing()
        if self.admitted >= self.limit:
            wait = self._seconds * (self.waiting + 1)
            raise Refusal(
                429,
                f"{self.admitted} requests are under way, and at most {self.limit} are taken (--queue): come again later",
                headers=retry_after(wait),
            )
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    async def run(self, job: Callable[[], T], receive: Receive) -> T:
        """The result of a job.  A client that goes away takes its job with it unless it has begun (``ClientDisconnect``)."""
        future: Future[T] = Future()
        with self._wake:
            if self.closed:
                raise _closing()
            self._jobs.append((job, future))
            self._wake.notify()
        answer = asyncio.wrap_future(future)
        gone = asyncio.ensure_future(_disconnect(receive))
        racing: set[asyncio.Future[Any]] = {answer, gone}
        try:
            await asyncio.wait(racing, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            raise ClientDisconnect
        finally:
            gone.cancel()
            answer.cancel()
            if future.cancel():
                with self._wake:
                    self._jobs = deque(entry for entry in self._jobs if entry[1] is not future)

    def close(self) -> None:
        """Take no more jobs and refuse those that wait; the one in work goes on."""
        with self._wake:
            self.closed = True
            waiting, self._jobs = self._jobs, deque()
            self._wake.notify()
        for _, future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(_closing())

    def join(self, seconds: float) -> bool:
        """Wait for the job in work after :meth:`close`; False if it takes longer."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._jobs and not self.closed:
                    self._wake.wait()
                if not self._jobs:
                    return
                job, future = self._jobs.popleft()
            if future.set_running_or_notify_cancel():
                self._do(job, future)
            # An idle worker must not hold on to the last question and answer.
            del job, future

    def _do(self, job: Callable[[], Any], future: Future[Any]) -> None:
        start = time.perf_counter()
        try:
            result = job()
        except BaseException as error:
            # Its frames hold the tensors of the failed job.
            error.__traceback__ = error.__context__ = error.__cause__ = None
            future.set_exception(error)
        else:
            future.set_result(result)
        seconds = time.perf_counter() - start
        self._seconds = seconds if not self._seconds else 0.8 * self._seconds + 0.2 * seconds


def _closing() -> Refusal:
    return Refusal(503, "the server is shutting down", headers=retry_after(5))


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
