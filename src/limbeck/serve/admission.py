"""How many requests may be in the house at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from limbeck.serve.refusals import Refusal, retry_after


class Admission:
    """``limit`` bounds the requests that were admitted and are not yet answered to the last byte: waiting, in work or being sent."""

    def __init__(self, limit: int):
        self.limit = limit
        self.admitted = 0
        self.closed = False

    @contextmanager
    def admission(self) -> Iterator[None]:
        """Counts a request in, or refuses it (429, and 503 once closed); entered and left in the event loop."""
        if self.closed:
            raise closing()
        if self.admitted >= self.limit:
            raise Refusal(
                429,
                f"{self.admitted} requests are under way, and at most {self.limit} are taken (--queue): come again later",
                headers=retry_after(self.wait()),
            )
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    def wait(self) -> float:
        """Seconds after which a refused request may find room."""
        return 1.0


def closing() -> Refusal:
    """What is said to requests that come, or still wait, when the server goes down."""
    return Refusal(503, "the server is shutting down", headers=retry_after(5))
