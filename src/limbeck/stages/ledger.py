"""What a ranking has found so far: JSON lines, one a finished candidate, on disk before the next one starts.

A candidate that ran on its own, perhaps on another machine, has a file of its own; files merge by lying in one folder.  A line
belongs to one *identity* (options, weights, data): what was measured for another one is left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limbeck.errors import CheckpointError
from limbeck.records import sealed, unsealed

NAME = "ledger"


class Ledger:
    """All ``ledger*.jsonl`` of a folder; new lines go to one of them."""

    def __init__(self, folder: Path, identity: str, *, own: str | None = None, say: Callable[[str], None] = print):
        """``own`` is the file's suffix for a candidate that runs alone: ``ledger-3.jsonl``."""
        self.folder, self.identity = folder, identity
        self.path = folder / (f"{NAME}-{own}.jsonl" if own is not None else f"{NAME}.jsonl")
        folder.mkdir(parents=True, exist_ok=True)
        self._entries: dict[str, dict[str, Any]] = {}
        foreign = 0
        # The common file first: which of two lines of one candidate counts must not depend on when they came.
        for path in sorted(folder.glob(f"{NAME}*.jsonl"), key=lambda path: (path.name != f"{NAME}.jsonl", path.name)):
            for entry in read_lines(path):
                if entry["identity"] != identity:
                    foreign += 1
                else:
                    self._entries.setdefault(entry["candidate"], entry)
        if foreign:
            say(f"  {foreign} lines of the ledgers in {folder.name}/ belong to other options, weights or data and are left out")

    def __contains__(self, candidate: str) -> bool:
        return candidate in self._entries

    def __getitem__(self, candidate: str) -> Any:
        """What was found for a candidate."""
        return self._entries[candidate]["result"]

    def get(self, candidate: str, work: Callable[[], Any]) -> Any:
        """What is known of a candidate, else what ``work()`` finds, noted."""
        if candidate not in self:
            self.add(candidate, work())
        return self[candidate]

    def add(self, candidate: str, result: Any) -> None:
        """Append one line and wait until it is on disk."""
        entry = {"identity": self.identity, "candidate": candidate, "result": result}
        text = json.dumps(sealed(entry), allow_nan=False) + "\n"
        # Read back, so that a run that goes on computes with the same numbers as one that was interrupted here.
        self._entries[candidate] = json.loads(text)
        _end_with_newline(self.path)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a ledger; one that a crash cut short is left out.

    Raises:
        CheckpointError: a damaged line that is not the last one, or a file that cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); take it out to have its candidates run again") from error
    entries = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            entry = unsealed(text)
            if not isinstance(entry["candidate"], str):
                raise ValueError(f"its candidate is {entry['candidate']!r:.80}")
            entries.append({key: entry[key] for key in ("identity", "candidate", "result")})
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                continue
            raise CheckpointError(f"{path}:{number}: not a line of a ledger ({error}); take the line out to have its candidate run again") from error
    return entries


def _end_with_newline(path: Path) -> None:
    """Cut off what a crash left of a last line."""
    if not path.exists():
        return
    held = path.read_bytes()
    if held and not held.endswith(b"\n"):
        with path.open("rb+") as file:
            file.truncate(held.rfind(b"\n") + 1)
