"""One thread for the model, and how many requests may be in the house at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from limbeck.serve.admission import Admission, closing

T = TypeVar("T")


class Worker(Admission):
    """Does jobs one after the other, in the order in which they came, in a thread of its own."""

    def __init__(self, limit: int):
        super().__init__(limit)
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

    def wait(self) -> float:
        """The time of those that wait, as the last ones went."""
        return self._seconds * (self.waiting + 1)

    async def run(self, job: Callable[[], T], receive: Receive) -> T:
        """The result of a job.  A client that goes away takes its job with it unless it has begun (``ClientDisconnect``)."""
        future: Future[T] = Future()
        with self._wake:
            if self.closed:
                raise closing()
            self._jobs.append((job, future))
            self._wake.notify()
        answer = asyncio.wrap_future(future)
        gone = asyncio.ensure_future(disconnected(receive))
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
                future.set_exception(closing())

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


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
