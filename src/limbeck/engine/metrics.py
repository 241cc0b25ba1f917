"""``metrics.jsonl``: the one source of truth of a run.  One JSON line a logged step, flat keys.

A training line has ``step`` (updates done), ``tokens``, ``loss`` (mean since the line before), ``losses`` (every step since then,
so that two runs can be compared bit by bit), for each objective ``<name>/raw`` and ``<name>/weighted``, the objectives' own
metrics (``kl`` and ``ce`` in nats per token, ``agreement`` ...), ``grad_norm``, ``lr/<group>``, ``tokens_per_second``,
``memory_bytes``, ``teacher_seconds``, ``eta_seconds`` and ``time``.  A validation line has ``step`` and ``validation/...`` keys
only.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

from limbeck.errors import CheckpointError
from limbeck.records import parse


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); move it away to go on without it") from error
    rows = []
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            row = parse(text)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("it has no step")
            rows.append(row)
        except ValueError as error:
            if number == len(lines):  # no newline after it: the writer died in the middle of it
                continue
            raise CheckpointError(
                f"{path}:{number}: not a JSON line of metrics ({error}); move the file away to go on without it"
            ) from error
    return rows


def loss_trace(path: Path) -> list[float]:
    """Loss of every step from the first on."""
    return [math.nan if value is None else value for row in read_metrics(path) for value in row.get("losses", ())]


def _finite(value: Any) -> Any:
    """JSON has no NaN: non-finite numbers are written as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [_finite(v) for v in value] if isinstance(value, list) else value


class Mirror(Protocol):
    """What is told every line of the file: the ``kept`` ones when it begins, each new one as it is written."""

    def begin(self, kept: list[dict[str, Any]], resumed_step: int) -> None:
        """The file is open; it holds the ``kept`` lines, up to ``resumed_step``."""
        ...

    def write(self, row: dict[str, Any]) -> None:
        """One more line, with None for what is not finite."""
        ...

    def close(self) -> None:
        """No more lines come from this start."""
        ...


class MetricsWriter:
    """Appends lines.  Opening at a resumed step first cuts off everything logged after it."""

    def __init__(self, path: Path, resumed_step: int, mirror: Mirror | None = None):
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= resumed_step] if resumed_step else []
        if path.exists():
            beside = path.with_name(path.name + ".tmp")
            beside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            os.replace(beside, path)
        self._file = path.open("a", encoding="utf-8")
        self._mirror = mirror
        if mirror is not None:
            mirror.begin(kept, resumed_step)

    def write(self, row: dict[str, Any]) -> None:
        """Append one line and flush it."""
        line = {key: _finite(value) for key, value in row.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._mirror is not None:
            self._mirror.write(line)

    def close(self) -> None:
        """Flush to disk and close."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            if self._mirror is not None:
                self._mirror.close()
