"""What a run says while it works: one live line on a terminal, one plain line a logged step elsewhere, and ``training.log``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text


def duration(seconds: float) -> str:
    """``1h02m``, ``3m20s``, ``45s``."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def quantity(value: float) -> str:
    """``950``, ``12.3k``, ``4.56M``."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def describe(row: Mapping[str, Any], num_steps: int) -> str:
    """One line for a metrics row; the most useful words first, so that a narrow terminal cuts the rest."""
    parts = [f"step {row['step']}/{num_steps}", f"loss {row['loss']:.4f}"]
    parts += [f"{name} {row[name]:.4f}" for name in ("kl", "ce", "agreement") if isinstance(row.get(name), float)]
    waited = row.get("teacher_share", 0.0)
    parts += [f"waits {100 * waited:.0f}%"] if waited > 0.01 else []
    parts += [f"eta {duration(row['eta_seconds'])}", f"{quantity(row['tokens_per_second'])} tok/s"]
    parts += [f"|g| {row['grad_norm']:.3g}", f"{row['memory_bytes'] / 1e9:.2f} GB"]
    return "  ".join(parts)


def short_line(row: Mapping[str, Any], num_steps: int, elapsed: float) -> str:
    """``[  1000/ 100000] loss=2.34 lr=0.020 gnorm=1.2 tok/s=8500 elapsed=2000s``; the rate is the highest of the groups."""
    rate = max((value for name, value in row.items() if name.startswith("lr/")), default=0.0)
    shown = f"{rate:.3f}" if rate == 0 or rate >= 1e-3 else f"{rate:.2e}"
    head = f"[{row['step']:6d}/{num_steps:7d}] loss={row['loss']:.2f} lr={shown} gnorm={row['grad_norm']:.1f}"
    return f"{head} tok/s={row['tokens_per_second']:.0f} elapsed={elapsed:.0f}s"


class Progress:
    """A run's voice.  ``console=None`` is silent (ranks other than 0, and tests); ``log`` is a file that everything is added to.

    ``short`` says on the console what the file holds.
    """

    def __init__(self, console: Console | None, title: str, num_steps: int, *, log: Path | None = None, short: bool = False):
        self.console = console
        self.title = title
        self.num_steps = num_steps
        self.short = short
        self._path = log
        self._log: TextIO | None = None
        self._began = time.monotonic()
        self._live: Live | None = None

    def start(self) -> None:
        """Begin the live line, if this is a terminal."""
        self._began = time.monotonic()
        if self.console is not None and self.console.is_terminal and not self.short:
            self._live = Live(Text(""), console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def update(self, row: Mapping[str, Any]) -> None:
        """Show a logged step."""
        line = short_line(row, self.num_steps, time.monotonic() - self._began)
        self._write(line)
        if not self.short:
            line = f"{self.title}  {describe(row, self.num_steps)}"
        if self._live is not None:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
        else:
            self._print(line)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._write(text)
        self._print(text)

    def note(self, text: str) -> None:
        """A line for the file, and for a console that shows what it holds."""
        self._write(text)
        if self.short:
            self._print(text)

    def _print(self, text: str) -> None:
        if self.console is not None:
            self.console.print(Text(text), soft_wrap=True)

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

    def close(self) -> None:
        """End the live line and the file."""
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._live is not None:
            self._live.stop()
            self._live = None
