"""What the console shows, as words: numbers, one line a metrics row, and a frame of the live view.  No terminal is needed for any of it."""

from __future__ import annotations

import math
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.text import Text

WAITING = 0.2
"""Share of the time spent waiting for the teacher above which a run is bound by it, and says so."""
WIDEST = 100
"""Columns of a frame: on wider terminals the eye would have to search for the numbers."""
PAUSE = 2.0
"""Seconds in one place after which a frame says what is being done there."""
FAR = 20 * 3600.0
"""Seconds from which a clock time needs its day."""


@dataclass(frozen=True)
class Marks:
    """Characters that a bar, a curve and a weighted sum are drawn with."""

    done: str
    edge: str
    todo: str
    heights: str
    weighs: str
    cut: str


UNICODE = Marks("━", "╸", "─", "▁▂▃▄▅▆▇█", "→", "…")
ASCII = Marks("#", "", "-", "_.-~=*#@", "->", "")


# -- words ---------------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """``2d03h``, ``1h02m``, ``3m20s``, ``45s``."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02d}h"
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


def printable(text: str, encoding: str | None) -> str:
    """``text`` with a question mark for what the encoding lacks and a space for what would move the cursor; lines stay lines."""
    clean = "".join(" " if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
    return clean.encode(encoding or "utf-8", "replace").decode(encoding or "utf-8")


def until(seconds: float, now: float) -> str:
    """``2h10m, until 04:35``; with the day where that is not soon."""
    clock = time.strftime("%H:%M" if seconds < FAR else "%a %H:%M", time.localtime(now + seconds))
    return f"{duration(seconds)}, until {clock}"


# -- frames --------------------------------------------------------------------------------------------------------------


def frame(
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str,
    num_steps: int,
    place: str = "",
    step: int | None = None,
    doing: str = "",
    doing_seconds: float = 0.0,
    elapsed: float | None = None,
    saved: tuple[int, float] | None = None,
    now: float | None = None,
    width: int = 80,
    height: int = 24,
    ascii_only: bool = False,
) -> Group:
    """The live view of a training run at one moment: at most ``height`` lines of at most ``width`` columns, whatever these are.

    Lines that do not fit are left out, the least important first, and so are words of a line.

    Args:
        rows: training lines of ``metrics.jsonl`` in order, as :func:`~limbeck.engine.metrics.read_metrics` gives them (lines of
            validation are passed over).  The last one is shown, and the losses of all as a curve.
        place: where the stage stands, ``stage 2 of 5``.
        step: steps done by now, where that is more than the last row's.
        doing: what goes on in place of an ordinary step (``waiting for the teacher``), and ``doing_seconds`` for how long; without
            words these are the seconds of the current step.
        elapsed: seconds since this start of the run began.
        saved: step of the newest checkpoint, and the seconds since it was written.
        now: Unix time of the frame, for the clock time of the end; by default that of the last row.
    """
    marks = ASCII if ascii_only else UNICODE
    width = min(width, WIDEST)
    rows = [row for row in rows if "loss" in row]
    row: Mapping[str, Any] = rows[-1] if rows else {}
    step = max(step or 0, row.get("step", 0))
    words = _Words(row, step, num_steps, row.get("time", time.time()) if now is None else now)
    at = words.doing(doing, doing_seconds)
    if height == 1:
        parts = [Text(title, "bold"), Text(f"{step:,}/{num_steps:,}"), words.loss(), *words.left(), *at]
        return _group([_line(parts, width)], width, marks)
    # Most important first, each with its place on the screen.
    found: list[tuple[int, Text]] = [(1, _bar(step / max(1, num_steps), words.steps(), width, marks))]
    if row:
        numbers = _line([words.loss(), *words.measures()], width)
        room = min(24, width - numbers.cell_len - 3)
        found.append((2, _line([numbers, Text(curve(rows, room, marks) if room >= 8 else "", "cyan")], width)))
    found.append((5, _line([*words.left(), *at, *words.saved(saved)], width)))
    if row:
        found.append((4, _line([*words.pace()], width)))
    found.append((0, _ends([Text(title, "bold"), *_dim(place)], _dim("" if elapsed is None else duration(elapsed)), width)))
    if objectives := words.objectives(marks):
        named = _line([Text("objectives", "dim"), *objectives], width)
        found.append((3, named if objectives[0].plain in named.plain else _line(objectives, width)))
    shown = sorted([pair for pair in found if pair[1].plain][: max(1, height)], key=lambda pair: pair[0])
    return _group([line for _, line in shown], width, marks)


def count_frame(
    *,
    title: str,
    words: Sequence[str],
    share: float | None,
    place: str = "",
    elapsed: float = 0.0,
    width: int = 80,
    height: int = 24,
    ascii_only: bool = False,
) -> Group:
    """The live view of something long that is not training: ``share`` of it is done, None where its size is not known."""
    marks = ASCII if ascii_only else UNICODE
    width = min(width, WIDEST)
    head = _ends([Text(title, "bold"), *_dim(place)], _dim(duration(elapsed)), width)
    texts = [Text(word) for word in words if word]
    line = _line(texts, width) if share is None else _bar(share, texts, width, marks)
    return _group([head, line][-max(1, min(2, height)) :], width, marks)


def curve(rows: Sequence[Mapping[str, Any]], cells: int, marks: Marks = UNICODE) -> str:
    """The losses of ``rows`` over their steps in ``cells`` characters; empty for fewer than three.

    High outliers, most often the first steps, are cut off, since the rest would be flat.
    """
    points = [(row["step"], row["loss"]) for row in rows if isinstance(row["loss"], int | float) and math.isfinite(row["loss"])]
    if len(points) < 3:
        return ""
    first, last = points[0][0], points[-1][0]
    sums = [(0.0, 0)] * cells
    for step, loss in points:
        cell = (step - first) * (cells - 1) // max(1, last - first)
        sums[cell] = sums[cell][0] + loss, sums[cell][1] + 1
    means = [total / count for total, count in sums if count]
    low, high = min(means), sorted(means)[(len(means) - 1) * 9 // 10]
    scale = (len(marks.heights) - 1) / (high - low) if high > low else 0.0
    return "".join(marks.heights[min(len(marks.heights) - 1, round((value - low) * scale))] for value in means)


@dataclass(frozen=True)
class _Words:
    """The parts of a frame's lines."""

    row: Mapping[str, Any]
    step: int
    num_steps: int
    now: float

    def steps(self) -> list[Text]:
        share = 100 * self.step / max(1, self.num_steps)
        parts = [Text(f"{self.step:,}/{self.num_steps:,}"), Text(f"{share:.0f}%")]
        # Between two logged steps as many tokens come in as there came on average.
        tokens = self.row.get("tokens", 0) * self.step / max(1, self.row.get("step", 1))
        return [*parts, Text(f"{quantity(tokens)} tokens")] if tokens else parts

    def loss(self) -> Text:
        if not self.row:
            return Text("")
        value = self.row["loss"]
        broken = value is None or not math.isfinite(value)
        return Text.assemble(("loss ", "dim"), ("not finite", "bold red") if broken else (f"{value:.4f}", "bold"))

    def measures(self) -> list[Text]:
        row, parts = self.row, []
        if _is_number(row.get("kl")):
            parts.append(_named("KL", f"{row['kl']:.4f} nats/token"))
        if _is_number(row.get("agreement")):
            parts.append(_named("agreement", f"{row['agreement']:.1%}"))
        if _is_number(row.get("ce")) and not _is_number(row.get("kl")):
            parts.append(_named("CE", f"{row['ce']:.4f} nats/token"))
        if "grad_norm" in row:
            norm = row["grad_norm"]
            parts.append(_named("gradient", f"{norm:.3g}" if _is_number(norm) else "not finite"))
        return parts

    def objectives(self, marks: Marks) -> list[Text]:
        """Each loss as it is and as it is weighted; nothing where the one loss is the whole."""
        pairs = [(name.removesuffix("/raw"), value, self.row.get(f"{name.removesuffix('/raw')}/weighted")) for name, value in self.row.items()
                 if name.endswith("/raw") and _is_number(value)]  # fmt: skip
        if len(pairs) < 2 and all(_same(raw, weighted) for _, raw, weighted in pairs):
            return []
        found = []
        for name, raw, weighted in pairs:
            same = not _is_number(weighted) or _same(raw, weighted)
            found.append(_named(name, f"{raw:.4g}" if same else f"{raw:.4g} {marks.weighs} {weighted:.4g}"))
        return found

    def pace(self) -> list[Text]:
        row, parts = self.row, []
        if "tokens_per_second" in row:
            parts.append(Text(f"{quantity(row['tokens_per_second'])} tok/s"))
        if "memory_bytes" in row:
            parts.append(Text(f"{row['memory_bytes'] / 1e9:.2f} GB"))
        if share := row.get("teacher_share"):
            parts.append(_named("waiting for the teacher", f"{share:.0%}"))
            parts += [Text("teacher-bound", "yellow")] if share > WAITING else []
        return parts

    def left(self) -> list[Text]:
        eta, done = self.row.get("eta_seconds"), self.row.get("step", 0)
        if eta is None or not _is_number(eta) or self.step >= self.num_steps:
            return []
        steps = self.num_steps - self.step
        return [_named("left", until(eta * steps / max(1, self.num_steps - done), self.now))]

    def saved(self, saved: tuple[int, float] | None) -> list[Text]:
        return [] if saved is None else [_named("saved", f"step {saved[0]:,}, {duration(saved[1])} ago")]

    def doing(self, what: str, seconds: float) -> list[Text]:
        if seconds < PAUSE:
            return []
        return [Text(f"{what or f'in step {self.step + 1:,}'} for {duration(seconds)}", "yellow" if what else "dim")]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _same(raw: float, weighted: Any) -> bool:
    return _is_number(weighted) and math.isclose(raw, weighted, rel_tol=1e-4)


def _named(name: str, value: str) -> Text:
    return Text.assemble((f"{name} ", "dim"), value)


def _dim(text: str) -> list[Text]:
    return [Text(text, "dim")] if text else []


def _line(parts: Sequence[Text], width: int) -> Text:
    """As many parts as fit, from the first on, of which there is always something."""
    line = Text()
    for part in parts:
        gap = "   " if line.plain else ""
        if not part.plain or (line.plain and line.cell_len + len(gap) + part.cell_len > width):
            continue
        line.append(gap).append(part)
    return line


def _ends(left: Sequence[Text], right: Sequence[Text], width: int) -> Text:
    """Parts at the left and at the right end of a line; those at the right give way."""
    line = _line(left, width)
    for part in right:
        gap = width - line.cell_len - part.cell_len
        if gap >= 2:
            line.append(" " * gap).append(part)
    return line


def _bar(share: float, parts: Sequence[Text], width: int, marks: Marks) -> Text:
    words = _line(parts, width)
    room = min(48, width - words.cell_len - 3)
    if room < 6:
        return words
    cells = min(1.0, max(0.0, share)) * room
    done = int(cells)
    edge = marks.edge if cells - done >= 0.5 else ""
    drawn = [(marks.done * done + edge, "green"), (marks.todo * (room - done - len(edge)), "dim")]
    return Text.assemble(*drawn, "   ", words)


def _group(lines: Sequence[Text], width: int, marks: Marks) -> Group:
    """Lines that nothing wraps any more, in characters that can be drawn."""
    for line in lines:
        line.no_wrap, line.overflow = True, "crop"
        line.plain = printable(line.plain, "ascii" if marks is ASCII else "utf-8").replace("\n", " ").replace("\t", " ")
        line.truncate(max(1, width), overflow="ellipsis" if marks.cut else "crop")
    return Group(*lines)
