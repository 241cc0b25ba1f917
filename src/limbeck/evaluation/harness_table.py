"""What the harness measured, as rows of text; without the harness itself."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table

from limbeck.evaluation.table import decimal


def harness_table(results: dict[str, Any]) -> Table:
    """A task's metric a row, a model a column, as ``value ± standard error``; the best model of several is bold."""
    names = list(results["models"])
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for task, entry in results["tasks"].items():
        shots = f", {entry['fewshot']} shots" if entry["fewshot"] else ""
        count = f"{entry['documents']} documents" if entry["documents"] is not None else "a group"
        table.add_row(f"[dim]{task}: {count}{shots}[/dim]")
        for metric, measured in entry["metrics"].items():
            best = _best(measured, names)
            cells = [_cell(measured["values"].get(name), measured["stderr"].get(name)) for name in names]
            label = metric.removesuffix(",none").replace(",", ", ")
            table.add_row(f"  {label}", *(f"[bold]{cell}[/bold]" if name == best else cell for name, cell in zip(names, cells, strict=True)))
    return table


def _cell(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "–"
    return decimal(value) if stderr is None or not math.isfinite(stderr) else f"{decimal(value)} ± {stderr:.2g}"


def _best(measured: dict[str, Any], names: list[str]) -> str | None:
    """The one model that is best, if several were measured and one is."""
    values = {name: measured["better"] * value for name in names if (value := measured["values"].get(name)) is not None}
    if not measured["better"] or len(values) < 2:
        return None
    top = [name for name, value in values.items() if value == max(values.values())]
    return top[0] if len(top) == 1 else None
