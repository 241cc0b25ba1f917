"""Answers to requests that cannot be answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

_TYPES = {
    400: "invalid_request",
    401: "unauthorised",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    409: "conflict",
    413: "too_large",
    415: "unsupported_encoding",
    429: "queue_full",
    500: "server_error",
    503: "unavailable",
}


class Refusal(Exception):
    """A reply that is no answer: a status, a message that says the way out, and a type that a program can compare."""

    def __init__(self, status: int, message: str, *, headers: Mapping[str, str] | None = None, **details: Any):
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})
        self.details = details

    def reply(self) -> JSONResponse:
        """``{"error": {"message", "type", ...details}}``."""
        error = {"message": self.message, "type": _TYPES.get(self.status, "error"), **self.details}
        return JSONResponse({"error": error}, self.status, headers=self.headers)


def retry_after(seconds: float) -> dict[str, str]:
    """The header that says when to come again, in whole seconds from 1 to 60."""
    return {"retry-after": str(int(min(60, max(1, seconds + 0.999))))}
