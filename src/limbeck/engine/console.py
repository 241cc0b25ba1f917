"""What a run says while it works: one live line on a terminal, one plain line a logged step elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


class Progress:
    """A run's voice.  ``console=None`` is silent (ranks other than 0, and tests)."""

    def __init__(self, console: Console | None, title: str, num_steps: int):
        self.console = console
        self.title = title
        self.num_steps = num_steps
        self._live: Live | None = None

    def start(self) -> None:
        """Begin the live line, if this is a terminal."""
        if self.console is not None and self.console.is_terminal:
            self._live = Live(Text(""), console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def update(self, row: Mapping[str, Any]) -> None:
        """Show a logged step."""
        if self.console is None:
            return
        line = f"{self.title}  {describe(row, self.num_steps)}"
        if self._live is not None:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
        else:
            self.say(line)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self.console is not None:
            self.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """End the live line."""
        if self._live is not None:
            self._live.stop()
            self._live = None
