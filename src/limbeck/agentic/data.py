"""Trajectories by name: load, filter, render, cut and tokenise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from limbeck.config.load import load_text
from limbeck.data.conditions.store import ConditionSet
from limbeck.data.trajectories.build import build_trajectories
from limbeck.models.loading import resolve_source

DATASET = "nebius/SWE-rebench-openhands-trajectories"


def load_trajectories(
    folder: str | Path,
    path: str | Path | Sequence[str | Path] | None = None,
    *,
    tokenizer: str | Path,
    hub: str | None = None,
    arrow: bool = True,
    progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> ConditionSet:
    """Make training windows of trajectories in ``folder``, which is written anew; the artefact that a prepare_trajectories stage makes.

    What is kept: resolved, submitted, with a patch, of no repository of SWE-bench, four of an instance.  The prompt is the issue, at most
    512 tokens of it; the trajectory is cut into windows of at most 8192 tokens.  ``windows.arrow`` has ``input_ids``, ``labels`` and
    ``condition_ids`` as :func:`~limbeck.agentic.train_step` takes them; ``report.json`` and ``dropped.jsonl`` say what became of every row.

    Args:
        folder: where it is written.
        path: files, folders or globs; relative ones start at the working directory.
        tokenizer: folder, hub name or ``builtin:NAME``: the student's.
        hub: a dataset in place of files; by default :data:`DATASET`.
        settings: further fields of the stage, such as ``template``, ``filters={"resolved": False}`` or ``sequence=32768``.

    Raises:
        LimbeckError: settings that a recipe would refuse, files that are missing, nothing left, or issues that read the same.
    """
    stage: dict[str, Any] = {"kind": "prepare_trajectories", "tokenizer": str(tokenizer), "arrow": arrow, **settings}
    if path is None:
        stage["hub"] = {"path": hub or DATASET}
    else:
        stage["path"] = [str(path)] if isinstance(path, str | Path) else [str(one) for one in path]
        if hub is not None:
            stage["hub"] = {"path": hub}
    text = yaml.safe_dump({"name": "trajectories", "stages": {"windows": stage}}, sort_keys=False, allow_unicode=True)
    options: Any = load_text(text, label="load_trajectories").stages["windows"]
    return build_trajectories(options, Path(folder), tokenizer=resolve_source(str(tokenizer)), base_dir=Path(), progress=progress)
