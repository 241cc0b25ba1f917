"""Trackers: other people's pages of a run, which mirror ``metrics.jsonl`` line by line as it is written.

The file stays the source of truth: a tracker is told what the file says and nothing else, and one that fails is left off until the next
start, which catches up from the file.  ``trackers.json`` in the stage's folder holds each one's identity and how far it has been told, so
that a run that goes on does so in the same place, without a step twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from limbeck.config.parts.trackers import TRACKERS, TensorboardOptions, TrackioOptions, WandbOptions
from limbeck.records import parse

RECORD = "trackers.json"
LEFT_OUT = {"step", "time", "losses"}
"""Of a line: the axis, the clock, and what is no single number."""
PATIENCE = 30.0
"""Seconds that a tracker has for saying good-bye."""
TRAINING, VALIDATION = "training", "validation"


@dataclass(frozen=True)
class Tracked:
    """What a tracker is told of the run."""

    folder: Path
    """The stage's own."""
    name: str
    """RUN/STAGE."""
    recipe_dir: Path
    config: Mapping[str, Any]
    """The stage's settings, without secrets."""
    id: str = ""
    """The same at every start."""
    resumed_step: int = 0


class Tracker(Protocol):
    """One of them, made by ``implementation(options, tracked)`` when the run starts."""

    forgets: bool
    """Whether it drops the steps after ``tracked.resumed_step`` when it starts: then they are told again, otherwise they are not."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Show the numbers of one line."""

    def close(self) -> None:
        """The run is over, for now."""


class Trackers:
    """All trackers of a stage, on the first rank.  What one of them raises is said once, and never ends a run."""

    def __init__(self, options: Sequence[Any], tracked: Tracked, say: Callable[[str], None] = print):
        self.options = list(options)
        self.tracked = tracked
        self.say = say
        self._open: dict[str, Tracker] = {}
        self._record: dict[str, dict[str, Any]] = {}

    def begin(self, kept: Sequence[Mapping[str, Any]], resumed_step: int) -> None:
        """Start, or go on after ``resumed_step``; ``kept`` are the lines that the file holds, of which the missing ones are told."""
        held = _read(self.tracked.folder / RECORD) if kept or resumed_step else {}
        for options in self.options:
            record = held.get(options.kind, {})
            self._record[options.kind] = record = {"id": secrets.token_hex(6), TRAINING: 0, VALIDATION: 0, **record}
            tracked = replace(self.tracked, id=record["id"], resumed_step=resumed_step)
            with self._forgiving(options.kind):
                tracker = TRACKERS.build(options, tracked)
                self._open[options.kind] = tracker
                if tracker.forgets:
                    record.update({part: min(record[part], resumed_step) for part in (TRAINING, VALIDATION)})
        for row in kept:
            self.write(row)
        self._save()

    def write(self, row: Mapping[str, Any]) -> None:
        """Tell one line of the file."""
        part = VALIDATION if "loss" not in row else TRAINING
        values = {
            key: float(value)
            for key, value in row.items()
            if key not in LEFT_OUT and isinstance(value, int | float) and not isinstance(value, bool)
        }
        told = False
        for kind, tracker in list(self._open.items()):
            if row["step"] > self._record[kind][part]:
                with self._forgiving(kind):
                    tracker.log(values, row["step"])
                    self._record[kind][part], told = row["step"], True
        if told:
            self._save()

    def close(self) -> None:
        """Let each finish what it still has to send, within :data:`PATIENCE` seconds."""
        for kind, tracker in list(self._open.items()):
            failed: list[Exception] = []
            leaving = threading.Thread(target=_leave, args=(tracker, failed), daemon=True)
            leaving.start()
            leaving.join(PATIENCE)
            if failed or leaving.is_alive():
                self.say(f"WARNING: tracker '{kind}' did not finish ({failed[0] if failed else f'{PATIENCE:.0f} s have passed'}); metrics.jsonl has it all")
        self._open = {}

    @contextlib.contextmanager
    def _forgiving(self, kind: str) -> Any:
        try:
            yield
        except Exception as error:
            self._open.pop(kind, None)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.say(f"WARNING: tracker '{kind}' failed ({reason}) and is left off until the next start; the run and metrics.jsonl go on")

    def _save(self) -> None:
        path = self.tracked.folder / RECORD
        with contextlib.suppress(OSError):  # a full disk is told by what needs it
            beside = path.with_name(path.name + ".tmp")
            beside.write_text(json.dumps(self._record), encoding="utf-8")
            os.replace(beside, path)


def _leave(tracker: Tracker, failed: list[Exception]) -> None:
    try:
        tracker.close()
    except Exception as error:
        failed.append(error)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """What an earlier start noted; nothing where that cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        found = parse(path.read_bytes())
        known = {"id": str, TRAINING: int, VALIDATION: int}
        if isinstance(found, dict):
            return {
                kind: record
                for kind, record in found.items()
                if isinstance(record, dict) and all(isinstance(record.get(key), form) for key, form in known.items())
            }
    return {}


class Tensorboard:
    """Event files; what a dead start wrote after the checkpoint is purged by the new one's first event."""

    forgets = True

    def __init__(self, options: TensorboardOptions, tracked: Tracked):
        folder = tracked.folder / "tensorboard" if options.folder is None else tracked.recipe_dir / options.folder / tracked.name
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        self.writer = writer(log_dir=str(folder), purge_step=tracked.resumed_step + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases under one id; it takes no step back, so a step that it knows is not told again."""

    forgets = False

    def __init__(self, options: WandbOptions, tracked: Tracked):
        wandb = import_module("wandb")
        online = options.mode == "online"
        self.run = wandb.init(
            project=options.project, entity=options.entity, name=tracked.name, id=tracked.id, mode=options.mode, tags=list(options.tags),
            resume="allow" if online else None, dir=str(tracked.folder), config=dict(tracked.config), settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run in trackio's local database, or in a Space."""

    forgets = False

    def __init__(self, options: TrackioOptions, tracked: Tracked):
        trackio = import_module("trackio")
        space = {} if options.space is None else {"space_id": options.space}
        # The name is what it goes on by: a stage that was begun anew must not go on with the old one.
        self.run = trackio.init(
            project=options.project, name=f"{tracked.name} {tracked.id}", config=dict(tracked.config), resume="allow", embed=False, **space
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()
