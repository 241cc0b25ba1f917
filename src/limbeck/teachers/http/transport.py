"""The one module that imports the HTTP library: JSON out, bytes in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx2

CONNECT_SECONDS = 10.0
_HERE = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class Reply:
    """A whole answer, decompressed; ``wire_bytes`` is what it took on the way."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    wire_bytes: int


class TransportError(Exception):
    """No whole answer came; ``slow`` when time ran out, ``unreachable`` when nobody took the call."""

    def __init__(self, text: str, *, slow: bool = False, unreachable: bool = False):
        super().__init__(text)
        self.slow = slow
        self.unreachable = unreachable


class Transport:
    """One endpoint.  Made and used inside one event loop."""

    def __init__(self, url: str, *, token: str | None = None, connections: int = 8):
        self._url = httpx2.URL(url)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # Health checks and the canary must get through when every place is taken.
        limits = httpx2.Limits(max_connections=connections + 2, max_keepalive_connections=connections + 2)
        self._client = httpx2.AsyncClient(
            headers=headers,
            limits=limits,
            # A token goes where the recipe says and nowhere else.
            follow_redirects=False,
            # Reading certificates takes a while.
            verify=self._url.scheme == "https",
            # A proxy of the environment does not reach this machine's own ports.
            trust_env=self._url.host not in _HERE,
        )

    async def get(self, path: str, timeout: float) -> Reply:
        """One GET; raises :class:`TransportError`."""
        return await self._send("GET", path, None, timeout)

    async def post(self, path: str, body: Mapping[str, Any], timeout: float) -> Reply:
        """One POST of a JSON object; raises :class:`TransportError`."""
        return await self._send("POST", path, json.dumps(body, separators=(",", ":")).encode(), timeout)

    async def close(self) -> None:
        """Hang up."""
        await self._client.aclose()

    async def _send(self, method: str, path: str, content: bytes | None, timeout: float) -> Reply:
        url = self._url.copy_with(path=self._url.path.rstrip("/") + path) if path else self._url
        headers = {"Content-Type": "application/json"} if content is not None else {}
        limits = httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS))
        try:
            # The library's limits are for one read each; a server that drips would never run into them.
            async with asyncio.timeout(timeout):
                response = await self._client.request(method, url, content=content, headers=headers, timeout=limits)
        except (TimeoutError, httpx2.TimeoutException) as error:
            unreachable = isinstance(error, httpx2.ConnectTimeout)
            raise TransportError(f"no answer within {timeout:g} s", slow=True, unreachable=unreachable) from error
        except httpx2.ConnectError as error:
            raise TransportError(str(error) or "connection refused", unreachable=True) from error
        except (httpx2.HTTPError, OSError) as error:
            raise TransportError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error
        return Reply(response.status_code, response.headers, response.content, response.num_bytes_downloaded)


def address(url: str) -> tuple[str, int | None]:
    """Host and port of a URL; raises ``ValueError`` for one that is none, or is not of http or https."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(str(error)) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError("it needs the form http://HOST:PORT")
    return parsed.host, parsed.port


def shown(url: str) -> str:
    """The URL without a user's name and password."""
    parsed = httpx2.URL(url)
    return str(parsed.copy_with(username=None, password=None)) if parsed.userinfo else url
