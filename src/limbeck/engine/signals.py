"""Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP: a flag, polled by the loop at step boundaries."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from limbeck.interrupts import SIGNALS

ASKED = (signal.SIGINT, *SIGNALS)


class StopFlag:
    """While entered, the first signal only sets :attr:`reason`; a second Ctrl-C ends the process at once.

    Leaving at once is safe: a checkpoint is either committed or never read.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopFlag:
        # Handlers can be set in the main thread only; elsewhere the flag simply never rises.
        if threading.current_thread() is threading.main_thread():
            # Under nohup a closed terminal is no reason to stop.
            kept = {number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN}
            self._before = {number: signal.signal(number, self._handle) for number in ASKED if number not in kept}
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
