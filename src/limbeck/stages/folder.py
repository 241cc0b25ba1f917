"""The layout of a run directory, and what is known about each stage in it.

runs/<recipe>/
  recipe.json                  the resolved recipe of the last start
  environment.json             versions, machine, command
  exit_reason                  how the last start ended: finished, preempted or failed; none while one runs, or if it was killed
  data/<key>/                  prepared text, shared by the stages that use it
  <stage>/stage.json           kind, key, status, options, seconds
  <stage>/{model,data,conditions,signals,ranking,adapters,deltas,evaluation,export}/   its one artefact
  <stage>/metrics.jsonl, checkpoints/       of a train stage
  <stage>.stale-1/             what an earlier recipe made, set aside
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from limbeck.errors import CheckpointError, RunError
from limbeck.files import write_atomically
from limbeck.records import parse

EXIT_REASON = "exit_reason"


def make_run_dir(path: Path) -> None:
    """Make a run directory, or find it there; :class:`~limbeck.errors.RunError` for a place where none can be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{path}: no run directory can be made there ({error.strerror}): name another place, with --run-dir") from error


def model_of(path: Path) -> Path:
    """``model/`` of a stage, else the path itself: a model folder, or a name that is none here.

    Raises:
        RunError: a whole run, or a stage without a model, with the way out.
    """
    if (path / "model").is_dir():
        return path / "model"
    if not (path / "config.json").exists():
        if (path / "recipe.json").is_file():
            done = sorted(folder.name for folder in path.iterdir() if (folder / "model").is_dir() and ".stale-" not in folder.name)
            way = f"name a stage of it, {' or '.join(str(path / name) for name in done)}" if done else "no stage of it has made a model yet"
            raise RunError(f"{path}: is a whole run: {way}")
        if (path / "stage.json").is_file():
            raise RunError(f"{path}: this stage has made no model (yet): run its recipe to the end, or name a stage that trains one")
    return path


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a crash leaves the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False))
    except IsADirectoryError as error:
        raise CheckpointError(f"{path}: is a folder, and a file of that name is to be written: move it away and run again") from error


def read_json(path: Path) -> Any:
    """Read JSON; a damaged file is an error that names it."""
    try:
        return parse(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); set it aside, or start the stage again with --fresh") from error


def read_object(path: Path, **fields: type | tuple[type, ...]) -> dict[str, Any]:
    """Read a JSON object that has at least these fields, of these types; anything else is an error that names the file."""
    record = read_json(path)
    wrong = "it is no JSON object" if not isinstance(record, dict) else ""
    for name, kinds in fields.items() if not wrong else ():
        if not isinstance(record.get(name), kinds):
            wrong = f"{name} is {record[name]!r:.80}" if name in record else f"it has no {name}"
            break
    if wrong:
        raise CheckpointError(f"{path}: is damaged ({wrong}); set it aside, or start the stage again with --fresh")
    return record


def digest(value: Any) -> str:
    """A short hash of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


class StageFolder:
    """One stage's directory and its ``stage.json``."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def record(self) -> dict[str, Any] | None:
        """What ``stage.json`` says, or None before the stage's first start."""
        file = self.path / "stage.json"
        if not file.exists():
            return None
        return read_object(file, kind=str, key=str, status=str, options=dict, seconds=(int, float))

    def finished(self, key: str) -> bool:
        """Whether the artefact of exactly these inputs is there."""
        record = self.record
        return record is not None and record["key"] == key and record["status"] == "finished"

    def start(self, key: str, options: dict[str, Any]) -> None:
        """Note that the stage is under way; seconds spent before an interruption are kept."""
        held = self.record or {}
        write_json(
            self.path / "stage.json",
            {
                "kind": options["kind"],
                "key": key,
                "status": "running",
                "options": options,
                "seconds": held.get("seconds", 0.0) if held.get("key") == key else 0.0,
                "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            },
        )

    def end(self, status: str, seconds: float, **facts: Any) -> None:
        """Note how it ended."""
        record = self.record or {}
        record.update(status=status, seconds=round(record.get("seconds", 0.0) + seconds, 3), **facts)
        write_json(self.path / "stage.json", record)

    def set_aside(self) -> Path:
        """Rename what is there, so that nothing is lost and nothing half-new is read."""
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.stale-{number}")).exists():
            number += 1
        self.path.rename(aside)
        return aside


def changed_fields(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two resolved options differ, as ``path: old -> new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in sorted({*old, *new}):
            found += changed_fields(old.get(name), new.get(name), f"{path}.{name}".lstrip("."))
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, (a, b) in enumerate(zip(old, new, strict=True)) for line in changed_fields(a, b, f"{path}.{i}")]
    return [] if old == new else [f"{path}: {json.dumps(old, ensure_ascii=False)} -> {json.dumps(new, ensure_ascii=False)}"]
