"""What can go wrong with one request, and which of it is worth another try."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from limbeck.errors import TeacherError
from limbeck.teachers.http.transport import Reply, hidden

RETRIED = frozenset({408, 425, 429})
"""Of the 4xx; of the rest of them a second try would have the same answer.  All 5xx are tried again."""
CONGESTED = frozenset({408, 429, 503, 504})
_MEMORY = re.compile(r"out of memory|outofmemory|\boom\b", re.IGNORECASE)
_SHOWN = 600


class Fault(Exception):
    """Something that another try may mend.

    ``retry_after`` are the seconds that the server asks for; ``congested`` says that it had too much to do.
    """

    def __init__(self, text: str, *, retry_after: float | None = None, congested: bool = False):
        super().__init__(text)
        self.retry_after = retry_after
        self.congested = congested


class BadReply(Fault):
    """An answer that is not what was asked for: cut short, of another shape, not a distribution."""


class TooLarge(Fault):
    """More than the server can score at once."""


@dataclass
class Backoff:
    """Full jitter: a random wait below ``base * 2**i`` seconds, at most ``cap``."""

    base: float = 0.5
    cap: float = 30.0
    random: random.Random = field(default_factory=random.Random)

    def seconds(self, attempt: int, retry_after: float | None) -> float:
        """How long to wait after the ``attempt``-th failure, counted from 0; what the server asks for is the least."""
        wait = self.random.uniform(0, min(self.cap, self.base * 2 ** min(attempt, 30)))
        return max(wait, retry_after or 0.0)


def raise_for_status(reply: Reply, endpoint: str, secrets: Collection[str] = ()) -> None:
    """Raises :class:`Fault` for what may pass and :class:`~limbeck.errors.TeacherError`, with the server's words, for what will not.

    A server may say what it was sent: ``secrets`` are struck out.
    """
    status = reply.status
    if 200 <= status < 300:
        return
    if 300 <= status < 400:
        target = hidden(reply.headers.get("location", "nowhere"), secrets)[:_SHOWN]
        raise TeacherError(
            f"the teacher at {endpoint} answers {status} and points to {target}: it is not followed there, since a token goes where the recipe says "
            "and nowhere else; if that is your server, name it in `teacher.url`"
        )
    text = server_text(reply, secrets)
    said = f"{status}: {text}" if text else str(status)
    if status == 413 or (status >= 500 and _MEMORY.search(text)):
        raise TooLarge(said)
    if status in RETRIED or status >= 500:
        raise Fault(said, retry_after=retry_after(reply.headers), congested=status in CONGESTED)
    raise TeacherError(f"the teacher at {endpoint} refuses the request with {said}{_way_out(status)}")


def _way_out(status: int) -> str:
    if status in (401, 403):
        return "\nname the environment variable that holds its token in `teacher.token_env`"
    if status in (400, 404, 405, 422):
        return "\nis it the right `teacher.protocol` (limbeck, vllm, sglang, seed), and is the URL the server's root?"
    if status == 409:
        return "\nit is not the teacher that answered before: serve that one again, or begin a new run"
    return ""


def server_text(reply: Reply, secrets: Collection[str] = ()) -> str:
    """What the server says about an error, from the JSON forms in use, else its text; without ``secrets``, shortened."""
    text = hidden(reply.body.decode("utf-8", "replace").strip(), secrets)
    try:
        said = json.loads(text)
    except ValueError:
        return text[:_SHOWN]
    while isinstance(said, dict):
        said = next((said[key] for key in ("error", "message", "detail") if said.get(key)), text)
    return (said if isinstance(said, str) else text)[:_SHOWN]


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header, which holds a number or a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
