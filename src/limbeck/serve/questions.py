"""What is asked of a teacher, checked field by field before the model sees it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from limbeck.errors import did_you_mean
from limbeck.needs import TopK
from limbeck.serve.refusals import Refusal
from limbeck.teachers.documents import Ask
from limbeck.teachers.http.frames import VALUES

ENCODINGS = ("frame", "b64", "json")
FIELDS = ("sequences", "positions", "top_k", "temperatures", "samples", "seed", "encoding", "values", "expect")
MAX_SEQUENCES = 4096
MAX_TEMPERATURES = 16
TEMPERATURES = (0.01, 100.0)
BYTES_PER_TOKEN = 48
"""A body may take so many bytes for a token: an id and a position of it, each on an indented line of its own."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    ``max_tokens`` over all its sequences; ``max_values`` numbers in an answer made of JSON lists; ids below ``vocabulary``;
    ``context`` tokens a sequence (None: the model says none).
    """

    vocabulary: int
    max_top_k: int = 1024
    max_tokens: int = 16_384
    max_values: int = 4_000_000
    context: int | None = None

    @property
    def max_body(self) -> int:
        """Bytes of a request."""
        return 2**20 + BYTES_PER_TOKEN * self.max_tokens


@dataclass(frozen=True)
class Question:
    """A request to ``/v1/topk``.  ``expect`` is the digest or the fields of a fingerprint, or None."""

    asks: list[Ask]
    need: TopK
    seed: int
    encoding: str
    values: str
    expect: str | dict[str, Any] | None


@dataclass(frozen=True)
class Completion:
    """A request to the route of whole logits: sequences, and how many ids of each position (None: all)."""

    asks: list[Ask]
    top_k: int | None


def topk_question(body: Mapping[str, Any], limits: Limits) -> Question:
    """The question in a body; :class:`Refusal` names the field that is wrong, and how."""
    for name in body:
        if name not in FIELDS:
            raise _bad(str(name), f"unknown field{did_you_mean(str(name), FIELDS) or '; there are ' + ', '.join(FIELDS)}")
    sequences = _sequences(body, "sequences", limits)
    asks = [Ask(ids, at) for ids, at in zip(sequences, _positions(body, sequences), strict=True)]
    need = TopK(
        _integer(body, "top_k", 0, limits.max_top_k, way_out=" (--max-top-k)"),
        _temperatures(body),
        _integer(body, "samples", 0, limits.max_top_k, default=0, way_out=" (--max-top-k)"),
    )
    encoding = _choice(body, "encoding", ENCODINGS, "json")
    numbers = sum(len(ask.positions) for ask in asks) * (2 * need.k + need.samples + len(need.temperatures))
    if encoding == "json":
        _check_values(numbers, limits, "ask for encoding 'frame' or 'b64', or for fewer positions")
    expect = body.get("expect")
    if expect is not None and not isinstance(expect, str | dict):
        raise _bad("expect", "must be the digest of a fingerprint, or its fields")
    seed = _integer(body, "seed", 0, 2**63 - 1, default=0)
    return Question(asks, need, seed, encoding, _choice(body, "values", tuple(VALUES), "float32"), expect)


def completion(body: Mapping[str, Any], limits: Limits) -> Completion:
    """The question of ``{"input_ids", "return_logits": true, "top_k"}``; fields that it does not know are left alone."""
    if "input_ids" not in body and "prompt" in body:
        raise _bad("prompt", "this server scores token ids and generates no text: send input_ids")
    if body.get("return_logits") is not True:
        raise _bad("return_logits", "must be true: this server scores the tokens it is given and generates none")
    sequences = _sequences(body, "input_ids", limits)
    asks = [Ask(ids, np.arange(len(ids), dtype=np.int32)) for ids in sequences]
    top_k = None if body.get("top_k") is None else _integer(body, "top_k", 1, limits.max_top_k, way_out=" (--max-top-k)")
    tokens = sum(map(len, sequences))
    width = limits.vocabulary if top_k is None else 2 * min(top_k, limits.vocabulary) + 1
    _check_values(tokens * width, limits, "send top_k for the likeliest ids alone, or fewer tokens, or use POST /v1/topk")
    return Completion(asks, top_k)


def _bad(path: str, what: str) -> Refusal:
    return Refusal(400, f"{path}: {what}")


def _check_values(numbers: int, limits: Limits, way_out: str) -> None:
    if numbers > limits.max_values:
        raise Refusal(413, f"an answer of {numbers} numbers, and JSON lists may hold {limits.max_values} (--max-values): {way_out}")


def _lists(body: Mapping[str, Any], name: str) -> list[list[Any]]:
    if name not in body:
        raise _bad(name, "is missing")
    value = body[name]
    if not isinstance(value, list):
        raise _bad(name, f"must be a list of lists of whole numbers, not {value!r:.40}")
    for i, inner in enumerate(value):
        if not isinstance(inner, list):
            raise _bad(f"{name}[{i}]", f"must be a list of whole numbers, not {inner!r:.40}")
    return value


def _sequences(body: Mapping[str, Any], name: str, limits: Limits) -> list[np.ndarray]:
    lists = _lists(body, name)
    if len(lists) > MAX_SEQUENCES:
        raise Refusal(413, f"{name}: {len(lists)} sequences in one request, and at most {MAX_SEQUENCES} are taken: send fewer at a time")
    tokens = sum(map(len, lists))
    if tokens > limits.max_tokens:
        raise Refusal(
            413,
            f"{name}: {tokens} tokens in one request, and at most {limits.max_tokens} are taken (--max-tokens): "
            "send fewer sequences at a time",
        )
    for i, inner in enumerate(lists):
        if limits.context is not None and len(inner) > limits.context:
            raise _bad(f"{name}[{i}]", f"{len(inner)} tokens, and the model's context is {limits.context}")
        for j, token in enumerate(inner):
            if type(token) is not int:
                raise _bad(f"{name}[{i}][{j}]", f"{token!r:.40} is not a token id")
            if not 0 <= token < limits.vocabulary:
                raise _bad(f"{name}[{i}][{j}]", f"{_number(token)} is not in the vocabulary of {limits.vocabulary}")
    return [np.array(inner, dtype=np.int32) for inner in lists]


def _positions(body: Mapping[str, Any], sequences: list[np.ndarray]) -> list[np.ndarray]:
    lists = _lists(body, "positions")
    if len(lists) != len(sequences):
        raise _bad("positions", f"{len(lists)} lists for {len(sequences)} sequences: there must be one a sequence")
    for i, (inner, ids) in enumerate(zip(lists, sequences, strict=True)):
        before = -1
        for j, position in enumerate(inner):
            path = f"positions[{i}][{j}]"
            if type(position) is not int:
                raise _bad(path, f"{position!r:.40} is not a whole number")
            if not 0 <= position < len(ids):
                raise _bad(path, f"{_number(position)} is no position of a sequence of {len(ids)} tokens (the first is 0)")
            if position <= before:
                raise _bad(path, f"{position} after {before}: positions must ascend")
            before = position
    return [np.array(inner, dtype=np.int32) for inner in lists]


def _integer(body: Mapping[str, Any], name: str, low: int, high: int, *, default: int | None = None, way_out: str = "") -> int:
    value = body.get(name, default)
    if value is None:
        raise _bad(name, "is missing")
    if type(value) is not int:
        raise _bad(name, f"must be a whole number, not {value!r:.40}")
    if not low <= value <= high:
        raise _bad(name, f"{_number(value)} is not from {low} to {high}{way_out}")
    return value


def _temperatures(body: Mapping[str, Any]) -> tuple[float, ...]:
    values = body.get("temperatures", [1.0])
    if not isinstance(values, list) or not 1 <= len(values) <= MAX_TEMPERATURES:
        raise _bad("temperatures", f"must be a list of 1 to {MAX_TEMPERATURES} numbers")
    low, high = TEMPERATURES
    for i, value in enumerate(values):
        # A number such as 1e999 is an infinity to Python.
        if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
            raise _bad(f"temperatures[{i}]", f"{value!r:.40} is not a number from {low} to {high:g}")
    return tuple(map(float, values))


def _choice(body: Mapping[str, Any], name: str, allowed: tuple[str, ...], default: str) -> str:
    value = body.get(name, default)
    if value not in allowed:
        raise _bad(name, f"{value!r:.40} is not one of {', '.join(allowed)}")
    return value


def _number(value: int) -> str:
    """A number as text; one with thousands of digits is no use in a message (and Python refuses to write it)."""
    return str(value) if abs(value) < 10**20 else "a number of more than twenty digits"
