"""The training curves of one stage, from its metrics lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from limbeck.evaluation.table import percent
from limbeck.report.run import Stage
from limbeck.report.svg import Series, legend, line_chart, log_is_useful, number

POINTS = 160
SHARES = {"agreement", "accuracy", "teacher_share"}
NAMES = {
    "kl": ("KL from the teacher", "nats a token"),
    "ce": ("cross-entropy", "nats a token"),
    "agreement": ("top-1 agreement with the teacher", ""),
    "accuracy": ("accuracy of the next token", ""),
    "grad_norm": ("gradient norm", "before clipping"),
    "teacher_share": ("waiting for the teacher", "share of the time"),
}
MACHINERY = {"step", "tokens", "loss", "losses", "tokens_per_second", "memory_bytes", "teacher_seconds", "eta_seconds", "time"}
"""Keys of a metrics line that have no chart of their own."""


def training_figures(stage: Stage) -> list[tuple[str, str, str]]:
    """``(title, note, chart)``: loss, each metric beside its validation, residuals by layer, objectives, rates."""
    rows = [row for row in stage.metrics if "loss" in row]
    validations = [row for row in stage.metrics if any(key.startswith("validation/") for key in row)]
    figures = []
    losses = _losses(rows)
    if losses:
        points, width = thin(losses)
        validation = _column(validations, "validation/loss")
        series = [Series("training", points, "var(--student)")]
        series += [Series("held out", validation, "var(--teacher)", dashed=True, markers=True)] if validation else []
        figures.append(("loss", f"mean of {width} steps a point" if width > 1 else "every step", _chart(series, "loss")))
    keys = list(dict.fromkeys(key for row in [*rows, *validations] for key in row))
    for key in sorted({k.removeprefix("validation/") for k in keys} - MACHINERY - {k for k in keys if "/" in k}, key=_order):
        series = [
            Series("training", thin(_column(rows, key))[0], "var(--student)"),
            Series("held out", _column(validations, f"validation/{key}"), "var(--teacher)", dashed=True, markers=True),
        ]
        title, note = NAMES.get(key, (key.replace("_", " "), ""))
        series = [one for one in series if one.points]
        # Nobody waits for a teacher in this process; a zero of any other measure is news.
        idle = key == "teacher_share" and not any(y for one in series for _, y in one.points)
        if series and not idle:
            figures.append((title, note, _chart(series, title, percent if key in SHARES else number)))
    residuals = _family(rows, {key: f"layer {key.removeprefix('residual/')}" for key in keys if key.startswith("residual/")})
    if residuals:
        figures.append(("attention residual by layer", "squared error over power", _chart(residuals, "residual")))
    objectives = _family(rows, {key: key.removesuffix("/weighted") for key in keys if key.endswith("/weighted")})
    if len(objectives) > 1:
        figures.append(("objectives", "weighted", _chart(objectives, "objectives")))
    rates = _family(rows, {key: key.removeprefix("lr/") for key in keys if key.startswith("lr/")})
    if rates:
        figures.append(("learning rate", "", _chart(rates, "learning rate")))
    return figures


def _family(rows: list[dict[str, Any]], names: dict[str, str]) -> list[Series]:
    """One line a key, shaded from the first to the last."""
    return [Series(name, thin(_column(rows, key))[0], _shade(i, len(names))) for i, (key, name) in enumerate(names.items())]


def thin(points: Sequence[tuple[float, float]], most: int = POINTS) -> tuple[list[tuple[float, float]], int]:
    """At most ``most`` points, each the mean of a run of ``width`` neighbours; ``width`` is 1 where nothing was thinned."""
    width = math.ceil(len(points) / most) or 1
    runs = [points[i : i + width] for i in range(0, len(points), width)]
    return [(run[-1][0], sum(y for _, y in run) / len(run)) for run in runs], width


def _chart(series: list[Series], label: str, form: Callable[[float], str] = number) -> str:
    log = form is number and log_is_useful(series)
    return line_chart(series, x_label="step", y_label=label, log_y=log, y_format=form) + legend(series)


def _losses(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """``(step, loss)`` of every step; a line holds the losses since the line before."""
    points = []
    for row in rows:
        losses = row.get("losses") or [row["loss"]]
        first = row["step"] - len(losses) + 1
        points += [(float(first + i), loss) for i, loss in enumerate(losses) if loss is not None]
    return points


def _column(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(row["step"]), float(row[key])) for row in rows if isinstance(row.get(key), int | float)]


def _order(key: str) -> tuple[int, str]:
    known = list(NAMES)
    return (known.index(key) if key in known else len(known) - 1, key)


def _shade(index: int, total: int) -> str:
    """From the teacher's colour to the student's."""
    share = round(100 * index / max(total - 1, 1))
    return f"color-mix(in oklab, var(--student) {share}%, var(--teacher))" if total > 1 else "var(--student)"
