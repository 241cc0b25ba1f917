"""JSON files that Limbeck writes and believes when it reads them again.  Tiny; everything may use it.

A *sealed* record carries the SHA-256 of its own content, so that a changed number is told from one that was meant.  The seal may be
missing (older files have none); ``format`` stands outside it, so that another version's file is named as that.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

SEAL = "sha256"
_OUTSIDE = "format"


def parse(text: str | bytes) -> Any:
    """``json.loads``, for which whatever is wrong is a ValueError: nesting without end too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested without end") from None


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its seal."""
    return {**record, SEAL: _digest(record)}


def unsealed(text: str | bytes) -> dict[str, Any]:
    """The record of a file's text, without its seal.

    Raises:
        ValueError: no JSON object, or not the content that was sealed.
    """
    record = parse(text)
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    seal = record.pop(SEAL, None)
    if seal is not None and seal != _digest(record):
        raise ValueError("its content does not match its own checksum")
    return record


def _digest(record: dict[str, Any]) -> str:
    # By way of text, as it is read again: tuples are lists, keys are strings.
    plain = json.loads(json.dumps({name: value for name, value in record.items() if name != _OUTSIDE}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
