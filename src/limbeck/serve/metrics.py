"""Counters in Prometheus' text format."""

from __future__ import annotations

import threading
from collections.abc import Callable

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters, gauges that are read when asked, and summaries of a sum and a count.  Safe to use from any thread."""

    def __init__(self, prefix: str = "limbeck"):
        self._prefix = prefix
        self._lock = threading.Lock()
        self._help: dict[str, tuple[str, str]] = {}
        self._values: dict[str, dict[str, float]] = {}
        self._gauges: dict[str, Callable[[], float]] = {}

    def counter(self, name: str, description: str) -> None:
        """Declare a counter, which :meth:`add` counts up; its name ends in ``_total``."""
        self._declare(name, "counter", description)

    def summary(self, name: str, description: str) -> None:
        """Declare a summary of what :meth:`observe` gives: ``name_sum`` and ``name_count``."""
        self._declare(name, "summary", description)

    def gauge(self, name: str, description: str, read: Callable[[], float]) -> None:
        """Declare a number that ``read`` gives."""
        self._declare(name, "gauge", description)
        self._gauges[name] = read

    def _declare(self, name: str, kind: str, description: str) -> None:
        self._help[name] = (kind, description)
        self._values[name] = {}

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Count a declared counter up."""
        # Labels come from us, never from a client, so that the number of lines stays bounded and nothing needs escaping.
        text = "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}" if labels else ""
        self._add(name, text, amount)

    def observe(self, name: str, value: float) -> None:
        """One more value of a declared summary."""
        self._add(name, "_sum", value)
        self._add(name, "_count", 1)

    def _add(self, name: str, suffix: str, amount: float) -> None:
        with self._lock:
            values = self._values[name]
            values[suffix] = values.get(suffix, 0) + amount

    def total(self, name: str) -> float:
        """A counter over all its labels."""
        with self._lock:
            return sum(self._values[name].values())

    def text(self) -> str:
        """Everything, as ``/metrics`` shows it."""
        lines = []
        for name, (kind, description) in self._help.items():
            full = f"{self._prefix}_{name}"
            lines += [f"# HELP {full} {description}", f"# TYPE {full} {kind}"]
            if name in self._gauges:
                lines.append(f"{full} {self._gauges[name]():.10g}")
                continue
            with self._lock:
                values = dict(self._values[name])
            if not values:
                values = {"_sum": 0, "_count": 0} if kind == "summary" else {"": 0}
            lines += [f"{full}{suffix} {value:.10g}" for suffix, value in values.items()]
        return "\n".join(lines) + "\n"
