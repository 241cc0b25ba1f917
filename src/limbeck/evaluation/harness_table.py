"""What the harness measured, as rows of text; without the harness itself."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table

from limbeck.evaluation.table import Row, decimal, rows_table


def harness_table(results: dict[str, Any]) -> Table:
    """The rows as a rich table for the console."""
    return rows_table(harness_rows(results), list(results["models"]))


def harness_rows(results: dict[str, Any]) -> list[Row]:
    """A task's metric a row, as ``value ± standard error`` of each model of ``lm_eval.json``; a task is a group."""
    names, rows = list(results["models"]), []
    for task, entry in results["tasks"].items():
        shots = f", {entry['fewshot']} shots" if entry["fewshot"] else ""
        count = f"{entry['documents']} documents" if entry["documents"] is not None else "a group"
        for metric, measured in entry["metrics"].items():
            cells = tuple(_cell(measured["values"].get(name), measured["stderr"].get(name)) for name in names)
            label = metric.removesuffix(",none").replace(",", ", ")
            values = tuple(measured["values"].get(name) for name in names)
            rows.append(Row(f"{task}: {count}{shots}", label, cells, _best(measured["better"], values), values, decimal, measured["better"]))
    return rows


def _cell(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "–"
    return decimal(value) if stderr is None or not math.isfinite(stderr) else f"{decimal(value)} ± {stderr:.2g}"


def _best(better: int, values: tuple[float | None, ...]) -> int | None:
    """The one model that is best, if several were measured and one is."""
    known = {i: better * value for i, value in enumerate(values) if value is not None}
    if not better or len(known) < 2:
        return None
    top = [i for i, value in known.items() if value == max(known.values())]
    return top[0] if len(top) == 1 else None
