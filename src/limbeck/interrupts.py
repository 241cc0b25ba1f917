"""SIGTERM, SIGUSR1 and SIGHUP (a terminal that was closed) end what runs as Ctrl-C does: by a KeyboardInterrupt.  Tiny, no torch;
everything may use it.

Left alone, they kill the process where it stands.  Training takes them over while it runs (`engine/signals.py`) and gives them back.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
_ONE_REQUEST = 5.0
"""Seconds in which further signals are the same request: Slurm tells every process of a step, and torchrun tells its ranks once more."""


class Interrupts:
    """What was asked of this process by signals."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Name of the first signal."""
        self.held = False
        self._raised = -float("inf")

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """A signal has come: note its name and raise KeyboardInterrupt, unless it is held or is the request of just now, told
        again."""
        self.reason = self.reason or signal.Signals(number).name
        if not self.held and time.monotonic() - self._raised > _ONE_REQUEST:
            self._raised = time.monotonic()
            raise KeyboardInterrupt(self.reason)


def _in_charge() -> Interrupts | None:
    found = (signal.getsignal(number) for number in SIGNALS)
    return next((handler for handler in found if isinstance(handler, Interrupts)), None)


@contextmanager
def interruptible() -> Iterator[Interrupts]:
    """While entered, :data:`SIGNALS` raise KeyboardInterrupt; handlers that somebody else has set are left alone, and what nohup ignores.

    Entered again within itself, it is the same one.  In a thread that is not the main one it does nothing.
    """
    outer = _in_charge()
    if outer is not None or threading.current_thread() is not threading.main_thread():
        yield outer or Interrupts()
        return
    interrupts = Interrupts()
    ours = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, interrupts)
    try:
        yield interrupts
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def held() -> Iterator[None]:
    """Signals that come meanwhile are noted and raise nothing: for writing down how something ended."""
    interrupts = _in_charge() or Interrupts()
    before, interrupts.held = interrupts.held, True
    try:
        yield
    finally:
        interrupts.held = before
