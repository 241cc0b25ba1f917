"""The one module that imports the HTTP library: JSON out, bytes in."""

from __future__ import annotations

import asyncio
import gzip
import io
import ipaddress
import json
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote

import httpx2

CONNECT_SECONDS = 10.0
LARGEST = 2**30
"""Bytes of one answer, decompressed.  More is no answer to what is asked, or should be asked for in parts."""
_LEAST = 4
"""Characters of a secret that is looked for in what a server says: shorter ones are words of their own."""


@dataclass(frozen=True)
class Reply:
    """A whole answer, decompressed; ``wire_bytes`` is what it took on the way."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    wire_bytes: int


class TransportError(Exception):
    """No whole answer came; ``slow`` when time ran out, ``unreachable`` when nobody took the call, ``large`` when it was too long."""

    def __init__(self, text: str, *, slow: bool = False, unreachable: bool = False, large: bool = False):
        super().__init__(text)
        self.slow = slow
        self.unreachable = unreachable
        self.large = large


class Transport:
    """One endpoint.  Made and used inside one event loop."""

    def __init__(self, url: str, *, token: str | None = None, connections: int = 8):
        given = httpx2.URL(url)
        # Sent as a header, and not in a URL that the library's own log would print.
        self._url = given.copy_with(username=None, password=None)
        headers = {"Accept-Encoding": "gzip"} | ({"Authorization": f"Bearer {token}"} if token else {})
        # Health checks and the canary must get through when every place is taken.
        limits = httpx2.Limits(max_connections=connections + 2, max_keepalive_connections=connections + 2)
        self._client = httpx2.AsyncClient(
            headers=headers,
            auth=(given.username, given.password) if given.userinfo else None,
            limits=limits,
            # A token goes where the recipe says and nowhere else.
            follow_redirects=False,
            # Reading certificates takes a while.
            verify=self._url.scheme == "https",
            # A proxy of the environment does not reach this machine's own ports.
            trust_env=not _is_here(self._url.host),
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
                async with self._client.stream(method, url, content=content, headers=headers, timeout=limits) as response:
                    body = await _read(response)
        except (TimeoutError, httpx2.TimeoutException) as error:
            unreachable = isinstance(error, httpx2.ConnectTimeout)
            raise TransportError(f"no answer within {timeout:g} s", slow=True, unreachable=unreachable) from error
        except httpx2.ConnectError as error:
            raise TransportError(str(error) or "connection refused", unreachable=True) from error
        except (httpx2.HTTPError, OSError) as error:
            raise TransportError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error
        return Reply(response.status_code, response.headers, body, response.num_bytes_downloaded)


class Place(NamedTuple):
    """Where a URL leads, and whether it has a user's name or password."""

    host: str
    port: int | None
    named: bool


def address(url: str) -> Place:
    """The place of a URL; raises ``ValueError`` for one that is none, or is not of http or https."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(str(error)) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError("it needs the form http://HOST:PORT")
    return Place(parsed.host, parsed.port, bool(parsed.userinfo))


async def _read(response: httpx2.Response) -> bytes:
    """A body, counted as it comes and again as it is unpacked: the library unpacks without a limit, and a kilobyte may hold a gigabyte."""
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > LARGEST:
            raise _too_large()
    return _unpacked(bytes(body), response.headers.get("content-encoding", "identity").lower())


def _unpacked(body: bytes, encoding: str) -> bytes:
    if encoding == "identity" or not body:
        return body
    if encoding != "gzip":
        raise TransportError(f"an answer in content-encoding {encoding!r:.40}, which was not asked for")
    try:
        whole = gzip.GzipFile(fileobj=io.BytesIO(body)).read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise TransportError(f"an answer whose gzip is damaged or cut short ({error})") from error
    if len(whole) > LARGEST:
        raise _too_large()
    return whole


def _too_large() -> TransportError:
    return TransportError(f"an answer of more than {LARGEST:,} bytes", large=True)


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def secrets_of(url: str, token: str | None) -> tuple[str, ...]:
    """What must not stand in a message: a token, and a URL's password and the values of its query, as sent and as meant."""
    parsed = httpx2.URL(url)
    _, _, password = parsed.userinfo.decode().partition(":")
    sent = [token or "", password or parsed.userinfo.decode(), *(pair.partition("=")[2] for pair in parsed.query.decode().split("&"))]
    return tuple(sorted({word for one in sent for word in (one, unquote(one)) if len(word) >= _LEAST}, key=len, reverse=True))


def hidden(text: str, secrets: Collection[str]) -> str:
    """A text with stars in their places."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
