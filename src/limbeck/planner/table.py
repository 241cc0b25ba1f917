"""A plan for people: one table of stages, details of each, and a verdict at the end.  Plain text, the same when piped."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from limbeck.planner.devices import size_text, time_text
from limbeck.planner.report import Part, Plan

NOTHING = "nothing that was tried makes it fit (micro-batch, recomputing, precision, the teacher's dtype, more GPUs)"
WHEN = {"forward": "forward", "backward": "backward", "step": "optimiser", "save": "saving"}


def rendered(plan: Plan, details: bool = True) -> Iterator[Table | Text]:
    """Tables and lines, in the order in which they are read."""
    yield Text(f"{plan.title} on {plan.device}", style="bold")
    if len(plan.parts) > 1:
        yield _overview(plan)
    if details:
        for part in plan.parts:
            yield from _part(part, alone=len(plan.parts) == 1)
    yield from (Text(f"note: {note}") for note in plan.notes)
    yield from verdict(plan)


def _table(header: bool = False) -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=header)


def _row(table: Table, *cells: str) -> None:
    """Cells as they are: brackets are no markup."""
    table.add_row(*(Text(cell) for cell in cells))


def _overview(plan: Plan) -> Table:
    table = _table(header=True)
    for word, justify in (
        ("stage", "left"),
        ("kind", "left"),
        ("memory a rank", "right"),
        ("of", "right"),
        ("when", "left"),
        ("time", "right"),
        ("", "left"),
    ):
        table.add_column(word, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for part in plan.parts:
        most, when = part.peak
        time = "unknown" if part.seconds is None else time_text(part.seconds) if part.seconds else "–"
        memory = (size_text(most), size_text(part.budget), WHEN[when]) if part.items else ("–", "", "")
        _row(table, part.name, part.kind, *memory, time, "fits" if part.fits else "does not fit")
    return table


def _part(part: Part, alone: bool) -> Iterator[Table | Text]:
    if not part.facts and not part.items:
        return
    yield Text("")
    if not alone:
        yield Text(f"{part.name} ({part.kind})", style="bold")
    table = _table()
    for justify in ("left", "left", "right", "left"):
        table.add_column(justify=justify)
    group = ""
    for fact in part.facts:
        _row(table, "" if fact.group == group else fact.group, fact.name, fact.text, fact.note)
        group = fact.group
    for number, item in enumerate(sorted(part.items, key=lambda item: -item.most)):
        if item.most:
            _row(table, "" if number else "memory", item.name, size_text(item.most), item.note)
    if part.items:
        most, when = part.peak
        _row(table, "", "most at one time", size_text(most), f"{WHEN[when]}; {size_text(part.budget)} are there")
    yield table
    yield from (Text(f"  note: {note}") for note in part.notes)


def verdict(plan: Plan) -> Iterator[Text]:
    """The last lines: what does not fit and what would make it, or that all does."""
    yield Text("")
    time = "" if not plan.seconds else f"; {time_text(plan.seconds)} in all"
    if plan.seconds is None:
        known = sum(part.seconds or 0.0 for part in plan.parts)
        time = f"; {time_text(known)} and what is not known" if known else ""
    if plan.fits:
        yield Text(f"verdict: fits{time}")
        return
    for part in plan.parts:
        if not part.fits:
            yield Text(f"{part.name}: {part.violated}")
            ways = (" or " if part.alternatives else " ").join(part.changes)
            yield Text(f"  smallest change that fits: {ways}" if ways else f"  {NOTHING}")
    yield Text("verdict: does not fit")
