"""Reply bodies, compressed as the client allows."""

from __future__ import annotations

import gzip

import zstandard
from starlette.responses import Response

SMALLEST = 1024
"""Shorter bodies are not worth compressing."""


def accepted_encoding(header: str) -> str | None:
    """The best of zstd and gzip that an ``Accept-Encoding`` header allows; zstd at equal weight."""
    weights: dict[str, float] = {}
    for part in header.lower().split(","):
        name, _, parameter = (word.strip() for word in part.partition(";"))
        try:
            weights[name] = float(parameter.removeprefix("q=")) if parameter else 1.0
        except ValueError:
            weights[name] = 0.0
    known = {name: weights.get(name, weights.get("*", 0.0)) for name in ("zstd", "gzip")}
    best = max(known, key=known.__getitem__)
    return best if known[best] > 0 else None


def reply(body: bytes, media_type: str, accept_encoding: str = "") -> Response:
    """A whole reply.  The same body gives the same bytes: nothing of the time or the machine goes into a compressed one."""
    headers = {"vary": "accept-encoding"}
    encoding = accepted_encoding(accept_encoding) if len(body) >= SMALLEST else None
    if encoding is not None:
        body = zstandard.ZstdCompressor(level=3).compress(body) if encoding == "zstd" else gzip.compress(body, 1, mtime=0)
        headers["content-encoding"] = encoding
    return Response(body, media_type=media_type, headers=headers)
