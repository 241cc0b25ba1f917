"""One writer a run folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from limbeck.errors import RunError


class RunLock:
    """An advisory lock on ``folder/LOCK``.  The system frees it with the process, however that dies: it is never stale.

    ``folder=None`` locks nothing (ranks other than 0).
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        if self.folder is None:
            return self
        path = self.folder / "LOCK"
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise RunError(f"{self.folder} is in use by {owner}: wait for it, stop it, or give this run another name") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        self._file = file
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
