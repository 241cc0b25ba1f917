"""Which request may go next: places that adapt to the server, memory for answers that wait, first needed first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(eq=False)
class Ticket:
    """A request's claim.  ``order`` is smaller for what is needed earlier; ``num_bytes`` is what its answer will take."""

    order: tuple[int, ...]
    num_bytes: int
    urgent: Callable[[], bool]
    """True once somebody waits for the answer: nothing but a place may hold it up then."""
    reserved: bool = False
    sent: int = 0
    """Number of cuts when it went out."""
    ready: asyncio.Future[None] | None = field(default=None, repr=False)


class Admission:
    """Used inside one event loop.

    At most ``limit`` requests are out.  The limit is halved when the server has too much to do, once for all that went out under
    the old one, and grows by one for each full round of answers, up to ``places``.  Answers under way or waiting to be fetched
    take at most ``max_bytes``, except for those that somebody waits for, so that nothing can block.
    """

    def __init__(self, places: int, max_bytes: int):
        self.places = places
        self.limit = float(places)
        self.max_bytes = max_bytes
        self.reserved_bytes = 0
        self.most_bytes = 0
        self.out = 0
        self._cuts = 0
        self._closed_until = 0.0
        self._waiting: list[Ticket] = []

    @property
    def held_by(self) -> str:
        """What keeps the next request from going: ``places``, ``bytes``, or nothing (an empty word)."""
        if not self._waiting:
            return ""
        return "places" if self.out >= int(self.limit) else "bytes"

    async def enter(self, ticket: Ticket) -> None:
        """Wait for a place."""
        ticket.ready = asyncio.get_running_loop().create_future()
        self._waiting.append(ticket)
        self.admit()
        try:
            await ticket.ready
        except asyncio.CancelledError:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            raise

    def leave(self, ticket: Ticket, *, answered: bool, congested: bool = False, closed_for: float = 0.0) -> None:
        """Give the place back.  ``closed_for`` seconds nothing goes out."""
        self.out -= 1
        if congested and ticket.sent == self._cuts:
            self.limit = max(1.0, self.limit / 2)
            self._cuts += 1
        elif answered:
            self.limit = min(float(self.places), self.limit + 1 / self.limit)
        loop = asyncio.get_running_loop()
        if closed_for > 0:
            self._closed_until = max(self._closed_until, loop.time() + closed_for)
            loop.call_later(closed_for, self.admit)
        self.admit()

    def release(self, num_bytes: int) -> None:
        """Answers have been fetched, or will never be."""
        self.reserved_bytes -= num_bytes
        self.admit()

    def admit(self) -> None:
        """Let go what may go."""
        if asyncio.get_running_loop().time() < self._closed_until:
            return
        while self._waiting and self.out < int(self.limit):
            ticket = min(self._waiting, key=lambda waiting: (not waiting.urgent(), waiting.order))
            assert ticket.ready is not None
            if ticket.ready.cancelled():
                self._waiting.remove(ticket)
                continue
            fits = not self.reserved_bytes or self.reserved_bytes + ticket.num_bytes <= self.max_bytes
            if not (ticket.reserved or fits or ticket.urgent()):
                return
            self._waiting.remove(ticket)
            if not ticket.reserved:
                ticket.reserved = True
                self.reserved_bytes += ticket.num_bytes
                self.most_bytes = max(self.most_bytes, self.reserved_bytes)
            self.out += 1
            ticket.sent = self._cuts
            ticket.ready.set_result(None)
