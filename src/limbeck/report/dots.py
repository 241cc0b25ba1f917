"""Dots as inline SVG: values with intervals, one a line; and several values of many cases, side by side in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from limbeck.report.svg import linear_ticks, number

LABELS, VALUES, ROW, FOOT, TOP = 186, 52, 22, 36, 16
"""Units for names on the left, numbers on the right, a line, the axis below and the words above."""
LONGEST_LABEL = 32
HEIGHT, LEFT, RIGHT = 240, 44, 8
EMPTY = '<p class="empty">no finite value</p>'


@dataclass(frozen=True)
class Dot:
    """One line of a chart: a value and, where known, its interval."""

    name: str
    value: float
    interval: tuple[float, float] | None
    colour: str
    text: str
    """The value as it is written beside the line."""
    title: str
    """What hovering says."""
    strong: bool = False
    """The line that the chart is about."""


@dataclass(frozen=True)
class Case:
    """One case of several values, in the order of the chart's ``names``; values that are not finite are left out."""

    name: str
    values: tuple[float, ...]


def interval_chart(
    dots: Sequence[Dot],
    *,
    width: int,
    x_label: str,
    x_format: Callable[[float], str] = number,
    marks: Sequence[tuple[float, str]] = (),
    limits: tuple[float, float] | None = None,
) -> str:
    """An ``<svg>`` with a line for each dot.  ``marks`` are upright lines with a word; what lies beyond ``limits`` is an arrow at the edge."""
    finite = [dot for dot in dots if math.isfinite(dot.value)]
    if not finite:
        return EMPTY
    values = [*(dot.value for dot in finite), *(x for x, _ in marks), *(x for dot in finite for x in dot.interval or () if math.isfinite(x))]
    low, high = _padded([min(max(x, limits[0]), limits[1]) for x in values] if limits else values)
    left, right, bottom = LABELS, width - VALUES, TOP + ROW * len(dots)

    def across(x: float) -> float:
        return left + (min(max(x, low), high) - low) / (high - low) * (right - left)

    parts = [f'<svg viewBox="0 0 {width} {bottom + FOOT}" role="img" aria-label="{escape(x_label)}">']
    for x in linear_ticks(low, high, 4):
        parts.append(f'<path class="grid" d="M{across(x):.1f} {TOP}V{bottom}"/>')
        parts.append(f'<text class="tick" x="{across(x):.1f}" y="{bottom + 15}" text-anchor="middle">{escape(x_format(x))}</text>')
    for x, word in marks:
        parts.append(f'<path class="axis" stroke-dasharray="3 3" d="M{across(x):.1f} {TOP}V{bottom}"/>')
        parts.append(f'<text class="label" x="{across(x):.1f}" y="{TOP - 5}" text-anchor="middle">{escape(word)}</text>')
    parts.append(f'<path class="axis" d="M{left} {bottom}H{right}"/>')
    parts.append(f'<text class="label" x="{(left + right) / 2}" y="{bottom + FOOT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    for i, dot in enumerate(dots):
        y = TOP + ROW * (i + 0.5)
        short = dot.name if len(dot.name) <= LONGEST_LABEL else f"{dot.name[: LONGEST_LABEL - 1]}…"
        parts.append(f'<g style="color:{escape(dot.colour)}"><title>{escape(dot.title)}</title>')
        parts.append(f'<path style="fill:transparent" d="M0 {y - ROW / 2}H{width}v{ROW}H0z"/>')
        weight = ' style="font-weight:600;fill:var(--ink)"' if dot.strong else ""
        parts.append(f'<text class="label" x="0" y="{y + 4}"{weight}>{escape(short)}</text>')
        parts.append(f'<text class="label" x="{width}" y="{y + 4}" text-anchor="end"{weight}>{escape(dot.text)}</text>')
        if math.isfinite(dot.value):
            parts += _dot(dot, y, across, low, high)
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def _dot(dot: Dot, y: float, across: Callable[[float], float], low: float, high: float) -> list[str]:
    parts, x = [], across(dot.value)
    if dot.interval and all(map(math.isfinite, dot.interval)):
        ends = [across(end) for end in dot.interval]
        if ends[1] > ends[0]:
            parts.append(f'<path class="line" d="M{ends[0]:.1f} {y}H{ends[1]:.1f}"/>')
    if low <= dot.value <= high:
        return [*parts, f'<circle class="dot" cx="{x:.1f}" cy="{y}" r="4"/>']
    way = 7 if dot.value < low else -7
    return [*parts, f'<path class="dot" d="M{x:.1f} {y}l{way} -4.5v9z"/>']


def sorted_chart(cases: Sequence[Case], names: Sequence[str], colours: Sequence[str], *, width: int, x_label: str, y_label: str) -> str:
    """An ``<svg>`` with a column for each case, ordered by its first value, from the least: a dot for each value, joined by a thin line."""
    shown = sorted((case for case in cases if any(map(math.isfinite, case.values))), key=lambda case: _first(case.values))
    if not shown:
        return EMPTY
    low, high = _padded([value for case in shown for value in case.values if math.isfinite(value)])
    top, bottom, step = 8, HEIGHT - FOOT + 12, (width - RIGHT - LEFT) / len(shown)
    radius = max(1.2, min(3.4, 0.4 * step))

    def up(y: float) -> float:
        return bottom + (y - low) / (high - low) * (top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(y_label)} by {escape(x_label)}">']
    for y in linear_ticks(low, high):
        parts.append(f'<path class="grid" d="M{LEFT} {up(y):.1f}H{width - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{up(y) + 3.5:.1f}" text-anchor="end">{escape(number(y))}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{width - RIGHT}"/>')
    parts.append(f'<text class="label" x="{(LEFT + width - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    for i, case in enumerate(shown):
        x = LEFT + step * (i + 0.5)
        known = [(name, value, colour) for name, value, colour in zip(names, case.values, colours, strict=True) if math.isfinite(value)]
        words = ", ".join(f"{name} {value:.4f}" for name, value, _ in known)
        ends = [up(value) for _, value, _ in known]
        parts.append(f"<g><title>{escape(f'{case.name}: {words}')}</title>")
        parts.append(f'<path style="fill:transparent" d="M{x - step / 2:.1f} {top}h{step:.1f}V{bottom}h-{step:.1f}z"/>')
        parts.append(f'<path class="grid" d="M{x:.1f} {min(ends):.1f}V{max(ends):.1f}"/>')
        parts += [f'<circle style="fill:{escape(colour)}" cx="{x:.1f}" cy="{up(value):.1f}" r="{radius:.1f}"/>' for _, value, colour in known]
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def dot_legend(names: Sequence[str], colours: Sequence[str]) -> str:
    """The names of the dots."""
    items = (f'<span style="color:{escape(colour)}">● <b>{escape(name)}</b></span>' for name, colour in zip(names, colours, strict=True))
    return f'<p class="legend">{"".join(items)}</p>'


def _first(values: Sequence[float]) -> float:
    return values[0] if math.isfinite(values[0]) else math.inf


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """Range of the values with a margin, never empty."""
    low, high = min(values), max(values)
    pad = 0.05 * (high - low) or abs(low) * 0.1 or 1.0
    return low - pad, high + pad
