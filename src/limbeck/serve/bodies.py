"""Request bodies: read up to a limit, within a time, and parsed as strict JSON."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import Request

from limbeck.serve.refusals import Refusal

SECONDS = 60.0
"""Until a body must have arrived."""


async def read_body(request: Request, limit: int, *, way_out: str) -> bytes:
    """The bytes of a request of at most ``limit``; a longer one is refused before it is held in memory."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise Refusal(415, f"a body in content-encoding {encoding!r}: send it as it is")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(declared, limit, way_out)
    body = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise _too_large(f"more than {limit}", limit, way_out)
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {SECONDS:g} seconds", headers={"connection": "close"}) from None
    return bytes(body)


def _too_large(size: str, limit: int, way_out: str) -> Refusal:
    return Refusal(413, f"a body of {size} bytes, and at most {limit} are taken: {way_out}")


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object; NaN, infinities and anything else that is not JSON are refused."""
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"the body is a JSON {_kind(value)}, and must be an object")
    return value


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def _kind(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names[type(value)]
