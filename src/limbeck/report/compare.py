"""Runs, stages and cells of grids side by side: what differs in their recipes, what they share in numbers, what cannot be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import mean, stdev
from typing import Any

from rich.table import Table
from rich.text import Text

from limbeck.report.entries import Entry, narrowed
from limbeck.report.measures import Measure, Measures, measures
from limbeck.report.run import Run, Stage

ABSENT = "–"
MISSING: Any = object()
"""Where a recipe has no such setting."""
LONGEST = 44
"""Characters of a setting on the console; the page has all of it."""
WRITTEN_AFTER = ("summary", "samples")


@dataclass(frozen=True)
class Line:
    """One measure of several entries: None where it was not taken; ``best`` is None where there is no contest."""

    group: str
    name: str
    cells: tuple[Measure | None, ...]
    best: int | None

    def change(self, index: int) -> str:
        """An entry beside the first one, in words; empty where there is nothing to say."""
        first, this = self.cells[0], self.cells[index]
        return "" if index == 0 or first is None or this is None else this.beside(first)


@dataclass(frozen=True)
class Comparison:
    """Everything that is shown, before it is laid out."""

    entries: list[Entry]
    differences: list[tuple[str, tuple[str, ...]]]
    """Settings that differ, with the text of each entry."""
    lines: list[Line]
    seeds: list[tuple[list[str], list[tuple[str, str, str]]]]
    """Entries that differ in nothing but their seeds, with ``(measure, mean, standard deviation)``."""
    notes: list[str]
    """What cannot be compared, and what was compared instead."""


def compare(entries: Sequence[Entry]) -> Comparison:
    """Put entries side by side; what only one of them has is said, not shown."""
    chosen, notes = narrowed(entries)
    found = [measures(entry) for entry in chosen]
    lines = _lines(found)
    notes += [*_unfinished(chosen), *_unlike(chosen), *_alone(chosen, found)]
    if not lines:
        notes.append("There is no measure that two of them have: only their recipes are compared.")
    return Comparison(chosen, [*_differences(chosen), *_surroundings(chosen)], lines, _over_seeds(chosen, found), notes)


# -- recipes -----------------------------------------------------------------------------------------------------------------


def _differences(entries: Sequence[Entry]) -> list[tuple[str, tuple[str, ...]]]:
    """Settings that are not the same in all; stages by name for runs, one stage each otherwise."""
    if not all(entry.whole for entry in entries):
        return list(_differing([entry.stages[0].options for entry in entries]))
    rows: list[tuple[str, tuple[str, ...]]] = []
    for name in dict.fromkeys(name for entry in entries for name in entry.options):
        given = [entry.options.get(name, MISSING) for entry in entries]
        if MISSING in given:
            rows.append((name, tuple(ABSENT if one is MISSING else f"a {one.get('kind', 'train')} stage" for one in given)))
        if sum(one is not MISSING for one in given) > 1:
            kept = [i for i, one in enumerate(given) if one is not MISSING]
            for path, cells in _differing([given[i] for i in kept]):
                said = dict(zip(kept, cells, strict=True))
                rows.append((f"{name}.{path}", tuple(said.get(i, ABSENT) for i in range(len(given)))))
    return rows


def _differing(values: Sequence[Any], path: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """``(path, cells)`` of every setting that differs.  Parts of different kinds, and what only some have, are one row each."""
    if all(isinstance(value, dict) for value in values):
        keys = dict.fromkeys(key for value in values for key in value)
        alike = len({str(value.get("kind")) for value in values}) == 1 and (not path or any(all(key in value for value in values) for key in keys))
        if alike:
            for key in keys:
                yield from _differing([value.get(key, MISSING) for value in values], f"{path}.{key}".lstrip("."))
            return
    if all(isinstance(value, list) for value in values) and any(isinstance(item, dict) for value in values for item in value):
        for i in range(max(map(len, values))):
            yield from _differing([value[i] if i < len(value) else MISSING for value in values], f"{path}.{i}")
        return
    # A record of another version lacks a field that says nothing.
    plain = [None if value is MISSING or value in (False, [], {}) else value for value in values] if MISSING in values else values
    if any(value != plain[0] for value in plain):
        yield path, tuple(_words(value) for value in values)


def _words(value: Any) -> str:
    """A setting in words; a part by its kind and what it sets."""
    if value is MISSING:
        return ABSENT
    if isinstance(value, dict):
        inner = ", ".join(f"{key}: {_words(item)}" for key, item in value.items() if key != "kind" and item not in (None, [], {}, False))
        if not value.get("kind"):
            return inner
        return f"{value['kind']} ({inner})" if inner else str(value["kind"])
    if isinstance(value, list):
        return f"[{', '.join(map(_words, value))}]"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _surroundings(entries: Sequence[Entry]) -> list[tuple[str, tuple[str, ...]]]:
    """What else they were made with, as far as it differs: versions, machine, code."""

    def facts(run: Run) -> dict[str, str]:
        known = {key: run.environment[key] for key in ("machine", "device", "commit") if run.environment.get(key)}
        return {f"made with: {key}": str(value) for key, value in {**known, **run.environment.get("versions", {})}.items()}

    return list(_differing([facts(entry.run) for entry in entries]))


# -- numbers -----------------------------------------------------------------------------------------------------------------


def _lines(found: Sequence[Measures]) -> list[Line]:
    keys = [key for key in dict.fromkeys(key for one in found for key in one) if sum(key in one for one in found) > 1]
    groups = list(dict.fromkeys(group for group, _ in keys))
    lines = []
    for group, name in sorted(keys, key=lambda key: groups.index(key[0])):
        cells = tuple(one.get((group, name)) for one in found)
        lines.append(Line(group, name, cells, _best(cells)))
    return lines


def _best(cells: Sequence[Measure | None]) -> int | None:
    """The best of at least two; what prints alike is no contest."""
    known = [(i, cell) for i, cell in enumerate(cells) if cell is not None and math.isfinite(cell.value)]
    if len(known) < 2 or not known[0][1].better:
        return None
    best, winner = max(known, key=lambda item: item[1].better * item[1].value)
    return None if sum(cell.cell == winner.cell for _, cell in known) > 1 else best


def _over_seeds(entries: Sequence[Entry], found: Sequence[Measures]) -> list[tuple[list[str], list[tuple[str, str, str]]]]:
    """Groups of entries that are one recipe under several seeds."""

    def apart_from_seeds(index: int) -> str:
        named = entries[index].options.items()
        stripped = [[name if entries[index].whole else "", {key: value for key, value in options.items() if key != "seed"}] for name, options in named]
        return json.dumps(stripped, sort_keys=True)

    groups = []
    for _, members in groupby(sorted(range(len(entries)), key=apart_from_seeds), apart_from_seeds):
        same = sorted(members)
        if len(same) < 2:
            continue
        rows = []
        for key in found[same[0]]:
            cells = [found[i].get(key) for i in same]
            values = [cell.value for cell in cells if cell is not None and math.isfinite(cell.value)]
            first = found[same[0]][key]
            if len(values) == len(same) and first.better:
                rows.append((f"{key[0]}: {key[1]}", first.form(mean(values)), f"{stdev(values) / abs(mean(values)):.1%}" if mean(values) else ABSENT))
        groups.append(([entries[i].label for i in same], rows))
    return groups


def seed_of(entry: Entry) -> str:
    """The seeds of an entry's stages: one number where they are all the same."""
    seeds = {name: options.get("seed") for name, options in entry.options.items() if options.get("seed") is not None}
    if len(set(seeds.values())) == 1:
        return str(next(iter(seeds.values())))
    return ", ".join(f"{name} {seed}" for name, seed in seeds.items()) or ABSENT


# -- what cannot be compared -------------------------------------------------------------------------------------------------


def _unfinished(entries: Sequence[Entry]) -> list[str]:
    notes = []
    for entry in entries:
        half = [f"{stage.name} is {stage.record.get('status', '?')}" for stage in entry.stages if stage.record.get("status") != "finished"]
        missing = [name for name in entry.options if entry.run.stage(name) is None] if entry.whole else []
        if half or missing:
            notes.append(f"{entry.label} is not done: {', '.join([*half, *(f'{name} has not started' for name in missing)])}.")
    return notes


def _unlike(entries: Sequence[Entry]) -> list[str]:
    """Where numbers of one name do not mean the same."""
    notes, kinds = [], {entry.label: entry.main.kind for entry in entries if not entry.whole and entry.main}
    if len(set(kinds.values())) > 1:
        words = ", ".join(f"{label} is a {kind} stage" for label, kind in kinds.items())
        notes.append(f"These are stages of different kinds ({words}): only what they share is compared.")
    trained = [(entry, stage) for entry in entries if (stage := entry.main) is not None and stage.kind == "train"]
    for what, of, consequence in _MEANINGS:
        if len({json.dumps(of(entry, stage), sort_keys=True) for entry, stage in trained}) > 1:
            notes.append(f"Different {what}: {consequence}.")
    settings = [(entry.label, entry.evaluation[0].get("setting", {})) for entry in entries if entry.evaluation]
    fields = dict.fromkeys(field for _, setting in settings for field in setting if field not in WRITTEN_AFTER)
    unlike = {field: [json.dumps(setting.get(field), ensure_ascii=False) for _, setting in settings] for field in fields}
    told = [f"{field} {' / '.join(values)}" for field, values in unlike.items() if len(set(values)) > 1]
    if told:
        notes.append(f"Evaluated in different settings ({'; '.join(told)}): differences hold that too.")
    if len({str(entry.run.environment.get("device") or entry.run.environment.get("machine")) for entry in entries}) > 1:
        notes.append("Made on different machines: times, rates and memory say something about those.")
    return notes


def _alone(entries: Sequence[Entry], found: Sequence[Measures]) -> list[str]:
    """Groups of measures that one entry alone has."""
    notes = []
    for entry, own, rest in ((entry, one, [other for other in found if other is not one]) for entry, one in zip(entries, found, strict=True)):
        groups: dict[str, int] = {}
        for key in own:
            if not any(key in other for other in rest):
                groups[key[0]] = groups.get(key[0], 0) + 1
        if groups:
            words = ", ".join(f"{group} ({number} measure{'s' * (number > 1)})" for group, number in groups.items())
            notes.append(f"Only {entry.label} has: {words}; `limbeck report` shows it.")
    return notes


def data_of(run: Run, stage: Stage) -> dict[str, Any] | None:
    """The text that a stage's options name, by themselves or by other stages."""
    data, passed = stage.options.get("data"), {stage.name}
    while isinstance(data, dict) and isinstance(data.get("from"), str) and data["from"] not in passed:
        passed.add(data["from"])
        options = run.recipe.get("stages", {}).get(data["from"]) or {}
        data = options.get("data") or {key: value for key, value in options.items() if key not in ("kind", "grid", "seed")}
    return data if isinstance(data, dict) else None


def _teacher(entry: Entry, stage: Stage) -> Any:
    """Who taught: by fingerprint where one is recorded, else by what the recipe says of it."""
    options = stage.options.get("teacher") or {}
    known = (stage.record.get("made_from") or {}).get("teacher")
    if known:
        return known
    student = stage.options.get("student") or {}
    return [options.get(key) for key in ("model", "url", "signals", "teachers")] if options.get("kind") != "self" else student.get("base")


_MEANINGS: tuple[tuple[str, Callable[[Entry, Stage], Any], str], ...] = (
    (
        "tokenizers",
        lambda entry, stage: (data_of(entry.run, stage) or {}).get("tokenizer"),
        "a loss, a perplexity or a KL is per token of its own; bits per byte can be compared",
    ),
    (
        "training text",
        lambda entry, stage: {key: value for key, value in (data_of(entry.run, stage) or {}).items() if key not in ("tokenizer", "seed")},
        "losses of training and on held-out rows are on different documents",
    ),
    (
        "objectives",
        lambda entry, stage: stage.options.get("objectives"),
        "training losses are different sums; compare KL, agreement and what an evaluation says",
    ),
    ("teachers", _teacher, "KL, agreement and gaps are from different teachers"),
)
"""What makes numbers of one name mean different things, where it is found, and what follows."""


# -- console -----------------------------------------------------------------------------------------------------------------


def tables(comparison: Comparison) -> list[Table | Text]:
    """What the console shows, one thing after another, with empty lines between tables."""
    labels = [entry.label for entry in comparison.entries]
    out: list[Table | Text] = []
    if comparison.differences:
        table = _table("what differs", labels)
        for path, cells in comparison.differences:
            table.add_row(Text(path), *(Text(short(cell)) for cell in cells))
        out.append(table)
    else:
        out.append(Text("Their recipes are the same."))
    out.append(Text(""))
    if comparison.lines:
        table, group = _table("measure", labels, right=True), None
        for line in comparison.lines:
            if line.group != group:
                group = line.group
                table.add_row(Text(group, style="dim"))
            table.add_row(Text(f"  {line.name}"), *(_cell(line, i) for i in range(len(labels))))
        out += [table, Text("")]
    for members, rows in comparison.seeds:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for word in (f"over {len(members)} seeds: {', '.join(members)}", "mean", "deviation"):
            table.add_column(Text(word), justify="left" if word not in ("mean", "deviation") else "right")
        for row in rows:
            table.add_row(*map(Text, row))
        out += [table, Text("")]
    return out + [Text(f"* {note}") for note in comparison.notes]


def short(text: str, most: int = LONGEST) -> str:
    """A setting as far as a table has room."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _table(first: str, labels: Sequence[str], *, right: bool = False) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first)
    for label in labels:
        table.add_column(Text(label), justify="right" if right else "left", overflow="fold")
    return table


def _cell(line: Line, index: int) -> Text:
    cell = line.cells[index]
    text = Text(ABSENT if cell is None else cell.cell, style="bold" if index == line.best else "")
    change = line.change(index)
    return text.append(f" ({change})", style="dim not bold") if change else text
