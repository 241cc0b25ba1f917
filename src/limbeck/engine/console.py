"""What a run says while it works: a live view on a terminal or in a notebook, one plain line a logged step elsewhere, and ``training.log``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group

from limbeck.engine.frame import PAUSE, WAITING, count_frame, describe, duration, frame, quantity, short_line, until
from limbeck.engine.metrics import read_metrics
from limbeck.engine.screen import View, live_view, put

__all__ = ["WAITING", "Counter", "Counting", "Progress", "describe", "duration", "frame", "quantity", "short_line"]

BURST = 100
"""Lines of logged steps that are printed as they come."""
LINE_EVERY = 10.0
"""Seconds for each line after these, on average."""
SPOKEN = 15.0
"""Seconds between two lines about what is no training."""
REMEMBERED = 400
"""Rows that the curve of the loss is drawn from."""


class Pace:
    """Lets ``burst`` lines through, and one more for every :data:`LINE_EVERY` seconds: a log that a person can read."""

    def __init__(self, burst: int) -> None:
        self._left, self._at = float(burst), time.monotonic()
        self.held = False
        """Whether a line was kept back already."""

    def lets(self) -> bool:
        """Whether there is room for one more line now, which is then taken."""
        now = time.monotonic()
        self._left, self._at = min(BURST, self._left + (now - self._at) / LINE_EVERY), now
        if self._left < 1 - 1e-6:
            return False
        self._left -= 1
        return True


class Progress:
    """A training run's voice.  ``console=None`` is silent (ranks other than 0, and tests); ``log`` is a file that everything is added to.

    ``short`` says on the console what the file holds; ``quiet`` says nothing there and shows how far it is: for one of many short runs.
    ``place`` is where the stage stands in the recipe, for the live view.
    """

    def __init__(
        self, console: Console | None, title: str, num_steps: int, *, place: str = "", log: Path | None = None, short: bool = False,
        quiet: bool = False,
    ):  # fmt: skip
        self.console = console
        self.title = title
        self.num_steps = num_steps
        self.place = place
        self.short = short
        self.quiet = quiet
        self._path = log
        self._log: TextIO | None = None
        self._began = time.monotonic()
        self._view: View | None = None
        self._pace = Pace(0 if quiet else BURST)
        self._rows: list[Mapping[str, Any]] = []
        self._step = 0
        self._doing, self._since = "", self._began
        self._saved: tuple[int, float] | None = None
        self._stopped: Callable[[], str | None] = lambda: None

    def start(self, stopped: Callable[[], str | None] = lambda: None) -> None:
        """Begin the live view, if there is a place for one.  ``stopped`` tells the signal that ends the run after this step, if one came."""
        self._stopped = stopped
        self._began = self._since = time.monotonic()
        if self.console is None or self.short:
            return
        self._view = live_view(self.console, self._frame)
        if self._view is not None:
            self._view.start()

    def recall(self, metrics: Path) -> None:
        """Show a run that goes on from its beginning, which is in its file of metrics."""
        for row in read_metrics(metrics) if self._view is not None else ():
            self._remember(row)

    def doing(self, what: str, step: int | None = None) -> None:
        """What begins now, in place of or before an ordinary step (no words), and how many steps are done.  Costs nothing."""
        self._doing, self._since = what, time.monotonic()
        self._step = self._step if step is None else step

    def saved(self, step: int, at: float | None = None) -> None:
        """A checkpoint of this step is there, since the Unix time ``at``."""
        self._saved = step, time.time() if at is None else at

    def update(self, row: Mapping[str, Any]) -> None:
        """Show a logged step."""
        line = short_line(row, self.num_steps, time.monotonic() - self._began)
        self._write(line)
        self._remember(row)
        if self._view is not None:
            return
        if self._pace.lets() or (row["step"] == self.num_steps and not self.quiet):
            self._print(line if self.short else f"{self.title}  {describe(row, self.num_steps)}")
        elif not self._pace.held and not self.quiet:
            self._pace.held = True
            self._print(f"(a line in {LINE_EVERY:g} s from here on; metrics.jsonl has every logged step)")

    def say(self, text: str) -> None:
        """A line that stays."""
        self._write(text)
        if not self.quiet:
            self._print(text)

    def note(self, text: str) -> None:
        """A line for the file, and for a console that shows what it holds."""
        self._write(text)
        if self.short:
            self._print(text)

    def close(self) -> None:
        """End the live view, of which the last numbers stay, and the file."""
        if self._log is not None:
            self._log.close()
            self._log = None
        if (view := self._view) is not None:
            self.doing("")
            view.stop()
            self._view = None
            if self._rows and not self.quiet and not view.stays:
                self._print(f"{self.title}  {describe(self._rows[-1], self.num_steps)}")

    def _remember(self, row: Mapping[str, Any]) -> None:
        if "loss" not in row:
            return
        rows = [*self._rows, row]
        # Over a long run the curve needs its shape, not its every point.
        self._rows = rows if len(rows) <= REMEMBERED else [*rows[:-1:2], row]
        self._step = max(self._step, row["step"])

    def _frame(self, width: int, height: int, ascii_only: bool) -> Group:
        now, clock = time.monotonic(), time.time()
        doing, seconds = self._doing, now - self._since
        if signal := self._stopped():
            # A person who sees nothing happen presses Ctrl-C again, which ends the process where it stands.
            doing, seconds = f"{signal}: stops after this step and saves it,", max(PAUSE, seconds)
        return frame(
            self._rows, title=self.title, num_steps=self.num_steps, place=self.place, step=self._step, doing=doing,
            doing_seconds=seconds, elapsed=now - self._began, saved=self._saved and (self._saved[0], clock - self._saved[1]),
            now=clock, width=width, height=height, ascii_only=ascii_only,
        )  # fmt: skip

    def _print(self, text: str) -> None:
        if self.console is not None:
            put(self.console, text)

    def _write(self, text: str) -> None:
        if self._path is None:
            return
        try:
            if self._log is None:
                self._log = self._path.open("a", encoding="utf-8")
            self._log.write(text + "\n")
            self._log.flush()
        except OSError as error:
            # A full disk must not end a run over a line that the metrics hold too.
            self._path = None
            self._print(f"WARNING: training.log is not written any more ({error})")


Counting = Callable[[str, int | None], "Counter"]
"""Unit and how many of it there are, if that is known -> what counts them."""


class Counter:
    """How far something long is that is not training: a bar where there is a place for a live view, else a line now and then.

    ``total`` of ``unit`` are to be done, None where nobody knows; lines go through ``say``.
    """

    def __init__(
        self, say: Callable[[str], object], console: Console | None, title: str, *, unit: str, total: int | None = None, place: str = ""
    ):
        self._say, self._console = say, console
        self._title, self._unit, self._total, self._place = title, unit, total, place
        self._done = self._worked = 0
        self._facts = ""
        self._began = self._spoken = time.monotonic()
        self._view: View | None = None

    def __enter__(self) -> Counter:
        self._began = self._spoken = time.monotonic()
        self._view = live_view(self._console, self._frame) if self._console is not None else None
        if self._view is not None:
            self._view.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._view is not None:
            self._view.stop()
            self._view = None

    @property
    def rate(self) -> float:
        """Units a second, without those that were done before."""
        return self._worked / max(time.monotonic() - self._began, 1e-9)

    def add(self, amount: int = 1, *, before: bool = False, facts: str = "") -> None:
        """So many more are done; ``before`` if they were already, and took no time.  ``facts`` are shown beside the rate."""
        self._done += amount
        self._worked += 0 if before else amount
        self._facts = facts
        now = time.monotonic()
        if self._view is None and now - self._spoken >= SPOKEN:
            self._spoken = now
            self._say("  " + "  ".join(word for word in self._words() if word))

    def _words(self) -> list[str]:
        done, total, rate = self._done, self._total, self.rate
        share = f"{min(1.0, done / max(1, total)):.0%}" if total is not None else ""
        of = quantity(done) if total is None else f"{quantity(done)}/{quantity(total)}"
        left = "" if total is None or not rate or done >= total else f"left {until((total - done) / rate, time.time())}"
        return [share, f"{of} {self._unit}", left, f"{quantity(rate)} {self._unit}/s" if rate else "", self._facts]

    def _frame(self, width: int, height: int, ascii_only: bool) -> Group:
        share = None if self._total is None else self._done / max(1, self._total)
        return count_frame(
            title=self._title, words=self._words(), share=share, place=self._place, elapsed=time.monotonic() - self._began,
            width=width, height=height, ascii_only=ascii_only,
        )  # fmt: skip
