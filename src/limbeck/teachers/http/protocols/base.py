"""What every protocol says and keeps to, and what every answer is held against."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from limbeck.needs import TopK
from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.http.faults import BadReply
from limbeck.teachers.http.transport import Reply

MASS = 1 + 1e-3
"""The kept probabilities may add up to so much: served models round."""


class Protocol(ABC):
    """Requests and answers of one kind of server."""

    name: ClassVar[str]
    health_path: ClassVar[str]
    """Answers with any status when the server is there."""
    any_temperature: ClassVar[bool] = False
    """Whether the partition sum of each temperature comes back; if not, every answer is one at T = 1."""
    tokens_at_k: ClassVar[str] = ""
    """The server's own setting that limits k, for messages."""

    def __init__(self, model: str | None, seed: int):
        self.model = model
        self.seed = seed
        self.vocabulary: int | None = None
        """Number of ids, as far as the server says; k is never more."""

    @staticmethod
    def endpoint(url: str) -> str:
        """The URL that paths are appended to."""
        return url.rstrip("/")

    def answerable(self, need: TopK) -> TopK:
        """The part of a need that answers to it will have."""
        return need if self.any_temperature else replace(need, temperatures=(1.0,))

    @abstractmethod
    def request(self, asks: Sequence[Ask], need: TopK) -> tuple[str, dict[str, Any]]:
        """Path and JSON body that ask about some documents."""

    def heated(self, body: dict[str, Any], temperature: float) -> dict[str, Any]:
        """A request with another sampling temperature, where it has one (the probe asks whether that changes anything)."""
        return body

    @abstractmethod
    def parse(self, reply: Reply, asks: Sequence[Ask], need: TopK) -> list[TopKRows]:
        """The answers in a reply, one an ask.  Raises :class:`BadReply`, or anything of a ``LookupError``, ``TypeError`` or
        ``ValueError``, for what cannot be read."""

    def read(self, reply: Reply, asks: Sequence[Ask], need: TopK) -> list[TopKRows]:
        """:meth:`parse` and :func:`check_rows`; every way of being wrong is a :class:`BadReply`."""
        try:
            answers = self.parse(reply, asks, need)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BadReply(f"an answer that is not in the format of '{self.name}': {type(error).__name__}: {error}") from error
        if len(answers) != len(asks):
            raise BadReply(f"{len(answers)} answers to {len(asks)} documents")
        for ask, rows in zip(asks, answers, strict=True):
            check_rows(rows, ask, need, self.vocabulary)
        return answers


def check_rows(rows: TopKRows, ask: Ask, need: TopK, vocabulary: int | None) -> None:
    """Raises :class:`BadReply` unless this is a truncated distribution for each position asked about."""
    k = need.k if vocabulary is None else min(need.k, vocabulary)
    wanted = (len(ask.positions), k)
    if rows.ids_mK.shape != wanted or rows.logits_mK.shape != wanted:
        raise BadReply(f"{rows.ids_mK.shape} ids and {rows.logits_mK.shape} values where {wanted} were asked for")
    if rows.log_z_mZ.shape != (wanted[0], len(need.temperatures)):
        raise BadReply(f"logZ of shape {rows.log_z_mZ.shape} for {wanted[0]} positions and {len(need.temperatures)} temperatures")
    ids = [rows.ids_mK]
    if need.samples:
        if rows.samples_mS is None or rows.samples_mS.shape != (wanted[0], need.samples):
            raise BadReply(f"not the {need.samples} samples a position that were asked for")
        ids.append(rows.samples_mS)
    for part in ids:
        if part.size and (part.min() < 0 or (vocabulary is not None and part.max() >= vocabulary)):
            raise BadReply(f"ids from {part.min()} to {part.max()} in a vocabulary of {vocabulary}")
    if not (np.isfinite(rows.logits_mK).all() and np.isfinite(rows.log_z_mZ).all()):
        raise BadReply("values that are not finite")
    if (np.diff(rows.logits_mK, axis=1) > 0).any():
        raise BadReply("ids that are not in the order of their probability")
    for column, temperature in enumerate(need.temperatures):
        with np.errstate(over="ignore"):
            mass = np.exp(rows.logits_mK.astype(np.float64) / temperature - rows.log_z_mZ[:, column, None]).sum(1)
        if mass.size and mass.max() > MASS:
            raise BadReply(f"probabilities that add up to {mass.max():.4g} at T = {temperature:g}")


def json_of(reply: Reply) -> Any:
    """The JSON of a reply, which may be cut short."""
    try:
        return json.loads(reply.body)
    except ValueError as error:
        raise BadReply(f"an answer of {len(reply.body)} bytes that is not JSON ({error})") from error


def listed(value: Any, what: str, length: int) -> Sequence[Any]:
    """``value`` as the list of ``length`` that it must be."""
    if not isinstance(value, list) or len(value) != length:
        found = f"a list of {len(value)}" if isinstance(value, list) else type(value).__name__
        raise BadReply(f"{what}: {found} where a list of {length} was expected")
    return value


def log_probabilities(ids_mK: np.ndarray, values_mK: np.ndarray) -> TopKRows:
    """Rows of a source of log-probabilities: they are logits whose partition sum is 1 at T = 1."""
    return TopKRows(ids_mK.astype(np.int32), values_mK.astype(np.float32), np.zeros((len(ids_mK), 1), np.float32))


def field_of(mapping: Any, name: str) -> Any:
    """A field of a JSON object that must be there."""
    if not isinstance(mapping, Mapping) or name not in mapping:
        raise BadReply(f"an answer without {name!r}")
    return mapping[name]
