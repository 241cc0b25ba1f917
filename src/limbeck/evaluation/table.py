"""The comparison as rows of text: one measure a row, one model a column.  Console, page and card print the same rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Row:
    """One measure: its group, its name with the setting, a cell a model, and which is best (None: no contest)."""

    group: str
    measure: str
    cells: tuple[str, ...]
    best: int | None = None
    values: tuple[float | None, ...] = ()
    """What the cells say, as numbers."""
    form: Callable[[float], str] = str
    """How a number becomes a cell."""
    better: int = 0
    """1: more is better, -1: less is, 0: neither."""


def comparison_rows(results: dict[str, Any]) -> list[Row]:
    """Rows of a result of :func:`~limbeck.evaluation.evaluate.evaluate_models`, in the order in which it has its models.

    The best model is looked for among the students: a teacher is the yardstick, not a contestant.
    """
    names, teacher, rows = list(results["models"]), results.get("teacher"), []

    def add(group: str, measure: str, values: Iterable[float | None], form: Any, better: int = 0) -> None:
        values = list(values)
        contest = [i for i, v in enumerate(values) if v is not None and math.isfinite(v) and names[i] != teacher]
        best = max(contest, key=lambda i: better * values[i]) if better and len(contest) > 1 else None  # type: ignore[operator]
        cells = tuple("–" if value is None else form(value) for value in values)
        # What prints alike is no contest.
        if best is not None and sum(cells[i] == cells[best] for i in contest) > 1:
            best = None
        rows.append(Row(group, measure, cells, best, tuple(values), form, better))

    text, against = results.get("perplexity", {}), results.get("divergence", {})
    for key, label, form in (
        ("perplexity", "perplexity", decimal),
        ("ce", "cross-entropy, nats/token", "{:.4f}".format),
        ("bits_per_byte", "bits per byte", "{:.4f}".format),
    ):
        if any(key in entry for entry in text.values()):
            add("held-out text", label, [text[n].get(key) for n in names], form, -1)
    for key, label, form, better in (
        ("ce_gap", "cross-entropy gap to the teacher", "{:+.4f}".format, -1),
        ("kl", "KL from the teacher, nats/token", "{:.4f}".format, -1),
        ("agreement", "top-1 agreement with the teacher", percent, 1),
    ):
        if against:
            add("held-out text", label, [against.get(n, {}).get(key) for n in names], form, better)
    for task, distance in recall_points(results):
        found = [recall_at(results, n, task, distance) for n in names]
        add("recall", f"{task.replace('_', ' ')}, {distance} tokens back", found, percent, 1)
    for context in contexts(results, "cache"):
        add("KV + state", f"at {tokens(context)} tokens", [point(results, "cache", n, context, "bytes") for n in names], size, -1)
    reference = teacher or names[0]
    for context in contexts(results, "speed"):
        rates = [point(results, "speed", n, context, "tokens_per_second") for n in names]
        base = point(results, "speed", reference, context, "tokens_per_second")
        ratios = [rate / base if rate and base else None for rate in rates]
        add("decode rate", f"over {reference}'s, at {tokens(context)} tokens", ratios, "{:.2f}×".format, 1)
    add("size", "parameters", [results["models"][n]["parameters"] for n in names], count)
    return rows


def comparison_table(results: dict[str, Any]) -> Table:
    """The rows as a rich table for the console."""
    return rows_table(comparison_rows(results), list(results["models"]))


def rows_table(rows: Iterable[Row], names: list[str]) -> Table:
    """Rows as a rich table, a column a model; each group has a line of its own."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in names:
        table.add_column(Text(name), justify="right", no_wrap=True)
    group = None
    for row in rows:
        if row.group != group:
            table.add_row(Text(row.group, "dim"))
            group = row.group
        table.add_row(Text(f"  {row.measure}"), *(Text(cell, "bold" if i == row.best else "") for i, cell in enumerate(row.cells)))
    return table


def recall_points(results: dict[str, Any]) -> list[tuple[str, int]]:
    """``(task, distance)`` of the probes, in the order in which they were asked."""
    entries: list[dict[str, Any]] = next(iter(results.get("recall", {}).values()), [])
    return [(entry["task"], entry["distance"]) for entry in entries]


def recall_at(results: dict[str, Any], name: str, task: str, distance: int) -> float | None:
    """Accuracy of one model at one probe."""
    entries = results.get("recall", {}).get(name, [])
    return next((e["accuracy"] for e in entries if (e["task"], e["distance"]) == (task, distance)), None)


def contexts(results: dict[str, Any], measure: str) -> list[int]:
    """Contexts at which ``cache`` or ``speed`` was measured."""
    return [entry["context"] for entry in next(iter(results.get(measure, {}).values()), [])]


def point(results: dict[str, Any], measure: str, name: str, context: int, key: str) -> float | None:
    """One number of ``cache`` or ``speed``."""
    return next((e[key] for e in results.get(measure, {}).get(name, []) if e["context"] == context), None)


def decimal(value: float) -> str:
    """A number to four figures, without an exponent where it can be read without one."""
    if 1e4 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


def percent(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.1f}%"


def size(num_bytes: float) -> str:
    """Bytes in binary units."""
    power = min(3, max(0, math.frexp(max(num_bytes, 1))[1] - 1) // 10)
    value = num_bytes / 1024**power
    digits = ".3g" if value < 1000 else ".0f"
    return f"{value:{digits}} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def count(value: float) -> str:
    """A count with its SI suffix."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.0f}"


def tokens(value: int) -> str:
    """A context length: 4096 is 4k."""
    return f"{value // 1024}k" if value >= 1024 and value % 1024 == 0 else str(value)
