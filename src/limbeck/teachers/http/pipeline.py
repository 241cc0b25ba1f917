"""Requests on their way while the student trains: a thread with an event loop of its own, retries, and answers in order."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from limbeck.config.address import shown
from limbeck.errors import TeacherError
from limbeck.needs import TopK
from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.http.admission import Admission, Ticket
from limbeck.teachers.http.faults import Backoff, BadReply, Fault, TooLarge, raise_for_status
from limbeck.teachers.http.protocols import Protocol
from limbeck.teachers.http.transport import Reply, Transport, TransportError, hidden, secrets_of

Answers = list[TopKRows | None]
T = TypeVar("T")
_GLANCE = 0.25
"""Seconds after which a wait looks at what it waits for."""
LATENCIES = 512
"""Requests whose times are kept for the percentiles."""


@dataclass(frozen=True)
class Settings:
    """What a pipeline is told (:class:`~limbeck.config.parts.teachers.HttpTeacherOptions`)."""

    url: str
    token: str | None = None
    in_flight: int = 8
    max_bytes: int = 500_000_000
    tokens_per_request: int = 8192
    timeout: float = 120.0
    patience: float = 600.0
    on_failure: str = "wait"


class Question:
    """Some documents that were asked about together: a handle to wait on."""

    def __init__(self, pipeline: Pipeline, order: int, urgent: bool, patience: float):
        self._pipeline = pipeline
        self.order = order
        self.urgent = urgent
        self.patience = patience
        self.tickets: list[Ticket] = []
        self._done = threading.Event()
        self._answers: Answers = []
        self._error: BaseException | None = None
        self._fetched = False

    def done(self) -> bool:
        """Whether :meth:`wait` would return at once."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> Answers:
        """The answers, None for what the fault policy left out.

        Raises :class:`~limbeck.errors.TeacherError` when the policy gives up, and ``TimeoutError`` after ``timeout`` seconds.
        """
        if not self._done.is_set():
            self._pipeline.wait_for(self, self._done, timeout)
        if not self._fetched:
            self._fetched = True
            self._pipeline.fetched(sum(ticket.num_bytes for ticket in self.tickets if ticket.reserved))
        if self._error is not None:
            raise self._error
        return self._answers

    def finish(self, answers: Answers, error: BaseException | None) -> None:
        """The pipeline's side."""
        self._answers, self._error = answers, error
        self._done.set()


class Pipeline:
    """Asks one endpoint.  ``question`` returns at once; what happens meanwhile happens in the thread of this object.

    ``backoff`` has a seed of its own in tests.
    """

    def __init__(self, protocol: Protocol, settings: Settings, backoff: Backoff | None = None):
        self.protocol = protocol
        self.settings = settings
        self.backoff = backoff or Backoff()
        self.endpoint = protocol.endpoint(settings.url)
        self.shown = shown(settings.url)
        self.secrets = secrets_of(settings.url, settings.token)
        self.admission = Admission(settings.in_flight, settings.max_bytes)
        self.latencies: deque[float] = deque(maxlen=LATENCIES)
        self.counts: Counter[str] = Counter()
        self.waited: defaultdict[str, float] = defaultdict(float)
        """Seconds that :meth:`Question.wait` took, by what held the request up."""
        self._failure: TeacherError | None = None
        self._down = False
        self._orders = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        # Reading large JSON takes the interpreter for seconds: not on the loop, and not twice at a time.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="teacher-reader")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="teacher-requests", daemon=True)
        self._thread.start()
        self._transport = self.call(self._connect())

    # What other threads use

    def question(
        self, asks: Sequence[Ask], need: TopK, *, urgent: bool = False, alone: bool = False, patience: float | None = None
    ) -> Question:
        """Ask about documents; ``alone`` sends each in a request of its own."""
        groups = group(asks, 0 if alone else self.settings.tokens_per_request)
        question = Question(self, next(self._orders), urgent, self.settings.patience if patience is None else patience)
        question.tickets = [
            Ticket((question.order, i), answer_bytes(part, need), lambda: question.urgent) for i, part in enumerate(groups)
        ]
        self.spawn(self._answer(question, groups, need))
        return question

    def ask(self, asks: Sequence[Ask], need: TopK, *, alone: bool = False, patience: float | None = None) -> Answers:
        """Ask and wait."""
        return self.question(asks, need, urgent=True, alone=alone, patience=patience).wait()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something on the loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something on the loop beside the rest."""
        try:
            self._loop.call_soon_threadsafe(self._start, work)
        except RuntimeError:
            work.close()
            raise self._closed() from None

    def fail(self, error: TeacherError) -> None:
        """Every question from now on ends in this error."""
        self._failure = self._failure or error

    def wait_for(self, question: Question, done: threading.Event, timeout: float | None) -> None:
        """Let a question go first, wait until it is done, and note what it waited for."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        held = self.admission.held_by
        if not question.urgent:
            question.urgent = True
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self.admission.admit)
        while True:
            start = time.monotonic()
            there = done.wait(max(0.0, min(_GLANCE, end - start)))
            self._note(held or self.admission.held_by, time.monotonic() - start)
            if there:
                return
            if time.monotonic() >= end:
                raise TimeoutError("the teacher has not answered yet")
            if not self._thread.is_alive():
                raise self._closed()
            held = self.admission.held_by

    def fetched(self, num_bytes: int) -> None:
        """An answer has left; its memory is free for another."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.admission.release, num_bytes)

    def close(self) -> None:
        """End everything under way.  May be called twice."""
        if not self._thread.is_alive():
            return
        self.fail(self._closed())
        self.call(self._disconnect())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._reader.shutdown(wait=False)

    # What runs on the loop

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _connect(self) -> Transport:
        return Transport(self.endpoint, token=self.settings.token, connections=self.settings.in_flight)

    async def _disconnect(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._transport.close()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, question: Question, groups: list[list[Ask]], need: TopK) -> None:
        requests = [
            self._request(part, need, ticket, question.patience) for part, ticket in zip(groups, question.tickets, strict=True)
        ]
        found: list[Answers | BaseException] = []
        error: BaseException | None = None
        try:
            found = await asyncio.gather(*requests, return_exceptions=True)
            error = next((part for part in found if isinstance(part, BaseException)), None)
        except asyncio.CancelledError:
            error = self._closed()
            raise
        finally:
            # Also when the pipeline is closed: nobody may wait for ever.
            question.finish([] if error else [rows for part in found if isinstance(part, list) for rows in part], error)

    async def _request(self, asks: list[Ask], need: TopK, ticket: Ticket, patience: float) -> Answers:
        """One request, again and again if need be, in halves if it is too large."""
        first: float | None = None
        for attempt in itertools.count():
            if self._failure is not None:
                raise self._failure
            await self.admission.enter(ticket)
            try:
                answers = await self.attempt(asks, need)
            except Fault as fault:
                asked = fault.retry_after or 0.0
                self.admission.leave(ticket, answered=False, congested=fault.congested, closed_for=asked if fault.congested else 0.0)
                if isinstance(fault, TooLarge):
                    return await self._halves(asks, need, ticket, patience, fault)
                now = self._loop.time()
                first = now if first is None else first
                wait = self.backoff.seconds(attempt, fault.retry_after)
                if self.settings.on_failure == "abort" or self._down or now + wait - first > patience:
                    return self._give_up(asks, fault, now - first)
                self.counts["retries"] += 1
                await asyncio.sleep(wait)
            except BaseException as error:
                self.admission.leave(ticket, answered=False)
                if isinstance(error, TeacherError):
                    self.fail(error)
                raise
            else:
                self.admission.leave(ticket, answered=True)
                self._down = False
                return answers
        raise AssertionError("unreachable")

    async def attempt(self, asks: Sequence[Ask], need: TopK) -> Answers:
        """One request, once.  Raises :class:`Fault` for what another try may mend."""
        path, body = self.protocol.request(asks, need)
        start = self._loop.time()
        reply = await self.send(path, body)
        read = self._loop.run_in_executor(self._reader, self.protocol.read, reply, asks, need)
        answers: Answers = list(await read)
        self.latencies.append(self._loop.time() - start)
        self.counts["requests"] += 1
        self.counts["positions"] += sum(len(ask.positions) for ask in asks)
        return answers

    async def send(self, path: str, body: dict[str, Any] | None, timeout: float | None = None) -> Reply:
        """A POST, or a GET without a body; a good reply or an exception."""
        seconds = timeout or self.settings.timeout
        try:
            get_or_post = self._transport.get(path, seconds) if body is None else self._transport.post(path, body, seconds)
            reply = await get_or_post
        except TransportError as error:
            said = hidden(str(error), self.secrets)
            if error.large:
                raise TooLarge(said) from error
            raise Fault(said, congested=error.slow and not error.unreachable) from error
        self.counts["bytes"] += reply.wire_bytes
        raise_for_status(reply, self.shown, self.secrets)
        return reply

    async def reach(self, path: str, timeout: float) -> None:
        """Raises :class:`Fault` if nobody is there; whatever is answered, somebody is."""
        try:
            await self._transport.get(path, timeout)
        except TransportError as error:
            raise Fault(hidden(str(error), self.secrets)) from error

    async def _halves(self, asks: list[Ask], need: TopK, ticket: Ticket, patience: float, fault: TooLarge) -> Answers:
        if len(asks) == 1:
            error = TeacherError(
                f"the teacher at {self.shown} cannot score a document of {len(asks[0].ids)} tokens: {fault}\n"
                "raise the server's limits, or prepare shorter documents (data.sequence)"
            )
            self.fail(error)
            raise error
        self.counts["split"] += 1
        middle = len(asks) // 2
        # The memory is reserved already, for the whole.
        parts = [
            self._request(part, need, replace(ticket, order=(*ticket.order, i), num_bytes=0), patience)
            for i, part in enumerate((asks[:middle], asks[middle:]))
        ]
        found = await asyncio.gather(*parts, return_exceptions=True)
        for part in found:
            if isinstance(part, BaseException):
                raise part
        return [rows for part in found if isinstance(part, list) for rows in part]

    def _give_up(self, asks: Sequence[Ask], fault: Fault, seconds: float) -> Answers:
        policy = self.settings.on_failure
        if policy in ("skip", "ce_only"):
            self._down = True
            self.counts["left_out"] += len(asks)
            return [None] * len(asks)
        if policy == "abort":
            raised = TeacherError(f"the teacher at {self.shown} failed, and `on_failure: abort` stops the run: {fault}")
        else:
            strange = isinstance(fault, BadReply)
            again = " with answers that cannot be right" if strange else ""
            asked = f"is `teacher.protocol` right (now '{self.protocol.name}')?  If it is, " if strange else ""
            raised = TeacherError(
                f"the teacher at {self.shown} has failed for {seconds:.0f} s{again}; the last time: {fault}\n"
                f"{asked}bring it back and start the run again: it goes on where it stopped (`teacher.patience` is how long it waits)"
            )
        self.fail(raised)
        raise raised

    def _closed(self) -> TeacherError:
        return self._failure or TeacherError(f"the connection to the teacher at {self.shown} was closed")

    def _note(self, held: str, seconds: float) -> None:
        pressed = int(self.admission.limit) < self.settings.in_flight
        self.waited["congestion" if held == "places" and pressed else held or "latency"] += seconds


def group(asks: Sequence[Ask], tokens: int) -> list[list[Ask]]:
    """Documents in order, as many together as have ``tokens`` tokens, at least one: a request's content depends on nothing else."""
    groups: list[list[Ask]] = []
    room = 0
    for ask in asks:
        if not groups or len(ask.ids) > room:
            groups.append([])
            room = tokens
        groups[-1].append(ask)
        room -= len(ask.ids)
    return groups


def answer_bytes(asks: Sequence[Ask], need: TopK) -> int:
    """Memory that the answers take: ids and values of 4 bytes, logZ and samples too."""
    row = 4 * (2 * need.k + len(need.temperatures) + need.samples)
    return row * sum(len(ask.positions) for ask in asks)


def percentile(values: Sequence[float], share: float) -> float:
    """Of the values, NaN if there is none."""
    return float(np.quantile(np.asarray(values), share)) if len(values) else math.nan
