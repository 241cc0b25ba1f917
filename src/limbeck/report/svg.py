"""Line charts as inline SVG: axes, ticks, hover titles, colours from the page's custom properties."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

HEIGHT = 214
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 8, 36
HOVER_POINTS = 60


@dataclass(frozen=True)
class Series:
    """One line: ``colour`` is any CSS colour, such as ``var(--teacher)``."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False
    markers: bool = False


def number(value: float) -> str:
    """A tick label: 4 figures, SI suffix above ten thousand."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit and (limit > 1e3 or abs(value) >= 1e4):
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.4g}"


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside a range."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside a range; 2 and 5 times them too where there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [f * 10.0**d for d in decades for f in factors if low * 0.999 <= f * 10.0**d <= high * 1.001]
        if len(ticks) >= 3:
            return ticks
    return linear_ticks(low, high)


def log_is_useful(series: Sequence[Series]) -> bool:
    """All values positive, and the largest more than eight times the least."""
    values = [y for one in series for _, y in one.points]
    return bool(values) and min(values) > 0 and max(values) > 8 * min(values)


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    width: int = 340,
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] | None = None,
    y_ticks: Sequence[float] | None = None,
    y_range: tuple[float, float] | None = None,
    x_format: Callable[[float], str] = number,
    y_format: Callable[[float], str] = number,
) -> str:
    """An ``<svg>`` of lines; non-finite points are left out, and every point shown can be hovered over for its value."""
    finite = [(one, [p for p in one.points if math.isfinite(p[0]) and math.isfinite(p[1])]) for one in series]
    kept = [(one, points) for one, points in finite if points]
    flat = [p for _, points in kept for p in points]
    if not flat:
        return '<p class="empty">no points yet</p>'
    x_low, x_high = _span([x for x, _ in flat], log_x, margin=0.03 if x_ticks else 0)
    y_low, y_high = y_range or _span([y for _, y in flat], log_y, margin=0.05)
    across = _scale(x_low, x_high, LEFT, width - RIGHT, log_x)
    up = _scale(y_low, y_high, HEIGHT - BOTTOM, TOP, log_y)

    parts = [f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(y_label)} by {escape(x_label)}">']
    for y in y_ticks or (log_ticks(y_low, y_high) if log_y else linear_ticks(y_low, y_high)):
        parts.append(f'<path class="grid" d="M{LEFT} {up(y):.1f}H{width - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{up(y) + 3.5:.1f}" text-anchor="end">{escape(y_format(y))}</text>')
    for x in x_ticks or (log_ticks(x_low, x_high) if log_x else linear_ticks(x_low, x_high)):
        parts.append(f'<path class="axis" d="M{across(x):.1f} {HEIGHT - BOTTOM}v4"/>')
        label = escape(x_format(x))
        parts.append(f'<text class="tick" x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{label}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{width - RIGHT}"/>')
    middle = (LEFT + width - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    for one, points in kept:
        where = [(across(x), up(min(max(y, y_low), y_high))) for x, y in points]
        line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in where)
        dash = ' stroke-dasharray="5 4"' if one.dashed else ""
        parts.append(f'<g style="color:{escape(one.colour)}"><path class="line"{dash} d="{line}"/>')
        stride = math.ceil(len(points) / HOVER_POINTS)
        chosen = {*range(0, len(points), stride), len(points) - 1}
        for i in sorted(chosen):
            (x, y), (px, py) = points[i], where[i]
            title = f"{one.name}: {y_format(y)} at {x_label} {x_format(x)}"
            mark = f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="3"/>' if one.markers or len(points) == 1 else ""
            parts.append(f'{mark}<circle class="hover" cx="{px:.1f}" cy="{py:.1f}" r="5"><title>{escape(title)}</title></circle>')
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def legend(series: Sequence[Series]) -> str:
    """The names of the lines; of many, the first and the last."""
    if len(series) < 2:
        return ""
    shown = list(series) if len(series) <= 10 else [series[0], series[-1]]
    words = " … " if len(shown) < len(series) else ""
    items = [
        f'<span style="color:{escape(one.colour)}"><i class="key{" dashed" * one.dashed}"></i><b>{escape(one.name)}</b></span>'
        for one in shown
    ]
    return f'<p class="legend">{words.join(items)}</p>'


def _span(values: Sequence[float], log: bool, *, margin: float) -> tuple[float, float]:
    """Range of the values with a margin, never empty."""
    low, high = min(values), max(values)
    if log:
        factor = (high / low) ** margin if high > low else 2.0
        return low / factor, high * factor
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    return low - margin * (high - low), high + margin * (high - low)


def _scale(low: float, high: float, start: float, end: float, log: bool) -> Callable[[float], float]:
    """Value -> coordinate."""
    form = math.log if log else float
    return lambda value: start + (form(value) - form(low)) / (form(high) - form(low)) * (end - start)
