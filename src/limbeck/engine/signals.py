"""Ctrl-C, SIGTERM and SIGUSR1: a flag, polled by the loop at step boundaries."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType


class StopFlag:
    """While entered, the first signal only sets :attr:`reason`; a second Ctrl-C ends the process at once.

    Leaving at once is safe: a checkpoint is either committed or never read.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopFlag:
        # Handlers can be set in the main thread only; elsewhere the flag simply never rises.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            for descriptor in (1, 2):
                if os.isatty(descriptor):
                    os.write(descriptor, b"\x1b[?25h\n")  # a live view may have hidden the cursor
                    break
            os._exit(130)
        self.reason = signal.Signals(number).name
