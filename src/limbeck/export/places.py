"""Where an export may go: said before a model is read, and without losing what is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from limbeck.errors import RunError

MARKS = ("config.json", "adapter_config.json")
"""One of these is in whatever folder was exported."""


def check_file(path: Path) -> None:
    """Raise :class:`RunError` where no file of this name can be written."""
    if _exists(path) and path.is_dir():
        raise RunError(f"{path}: is a folder: give another --output, or move it away")
    _check_home(path)


def check_new_folder(path: Path, source: Path) -> None:
    """Raise :class:`RunError` where no folder of this name can be written, and for one that holds anything but an earlier export.

    A folder that is there is replaced as a whole, so it must not be that of the model itself (``source``) or one above it.
    """
    if path.resolve() in (source.resolve(), *source.resolve().parents):
        raise RunError(f"--output {path}: holds what is exported, and would be replaced: name another folder")
    if _exists(path):
        if not path.is_dir():
            raise RunError(f"--output {path}: is a file: name a folder")
        if any(path.iterdir()) and not any((path / mark).is_file() for mark in MARKS):
            raise RunError(f"--output {path}: holds something that is no export, and would be replaced: name a new folder, such as {path / source.name}")
    _check_home(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}): give another --output") from error


def _check_home(path: Path) -> None:
    home = next(parent for parent in path.absolute().parents if _exists(parent))
    if not home.is_dir():
        raise RunError(f"{path}: cannot be written, for {home} is a file: give another --output")
    if not os.access(home, os.W_OK | os.X_OK):
        raise RunError(f"{path}: cannot be written, for {home} is not writable: give another --output")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, a disk that is full or refuses is a :class:`RunError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}): give another --output") from error
