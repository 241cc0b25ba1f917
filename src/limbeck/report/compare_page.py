"""The page of a comparison: curves on common axes, tables with the differences, and what cannot be compared, in one file."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from limbeck.errors import RunError, did_you_mean
from limbeck.evaluation.table import percent
from limbeck.files import write_atomically
from limbeck.report.compare import Comparison, data_of, seed_of
from limbeck.report.curves import MACHINERY, NAMES, SHARES, thin
from limbeck.report.entries import Entry
from limbeck.report.html import document, duration, evaluation_figures, figure_grid, samples_panel
from limbeck.report.run import Stage
from limbeck.report.svg import Series, legend, line_chart, log_is_useful, number

AXES = ("tokens", "steps")
COLOURS = ("teacher", "student", "third", "fourth", "ink", "soft")
START = "<!doctype html>"


def check_axis(by: str) -> None:
    """Refuse what curves cannot run over.

    Raises:
        RunError: neither tokens nor steps.
    """
    if by not in AXES:
        raise RunError(f"--by {by}: curves run over no such thing{did_you_mean(by, AXES) or ';'} allowed: {', '.join(AXES)}")


def write_comparison(comparison: Comparison, path: Path, *, axis: str = "tokens") -> Path:
    """Write the page.

    Raises:
        RunError: no such folder, or a file that is no page of this kind and stays what it is.
    """
    if not path.parent.is_dir():
        raise RunError(f"--out {path}: there is no folder {path.parent}: make it, or name a place in one that is there")
    if path.is_dir():
        raise RunError(f"--out {path}: is a folder: name a file in it, such as {path / 'compare.html'}")
    if path.exists():
        with path.open("rb") as file:
            if file.read(len(START)) != START.encode():
                raise RunError(f"--out {path}: is there already and is no page of a comparison, so it is not written over: name another file")
    write_atomically(path, comparison_page(comparison, axis=axis))
    return path


def comparison_page(comparison: Comparison, *, axis: str = "tokens") -> str:
    """The whole page; curves run over ``tokens`` or ``steps``."""
    entries = comparison.entries
    colours = colours_of(entries)
    title = " · ".join(entry.label for entry in entries)
    body = [f'<header><p class="brow">Limbeck comparison</p><h1>{escape(title)}</h1></header>', _contents(entries, colours)]
    if comparison.notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes)
        body.append(f"<h2>What cannot be compared, and what is not there</h2><ul>{items}</ul>")
    body.append(f"<h2>What differs in the recipes</h2>{_differences(comparison)}")
    for heading, figures in curves(entries, colours, axis):
        body.append(f"<h2>{escape(heading)}</h2><p class='note'>Solid: training. Dashed, with dots: held out.</p>{figure_grid(figures)}")
    if comparison.lines:
        body.append(f"<h2>Numbers</h2>{_measures(comparison)}")
    combined = _combined(entries)
    if len(combined["models"]) > 1:
        body.append(figure_grid(evaluation_figures(combined, {name: colours[name] for name in combined["models"]}), "figures two"))
    for members, rows in comparison.seeds:
        cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(mean)}</td><td>{escape(deviation)}</td></tr>" for name, mean, deviation in rows)
        note = f"{', '.join(members)}: one recipe, {len(members)} seeds. Deviation: standard deviation over the mean."
        head = "<thead><tr><th></th><th>mean</th><th>deviation</th></tr></thead>"
        body.append(f"<h2>Over seeds</h2><p class='note'>{escape(note)}</p><div class='wide'><table>{head}<tbody>{cells}</tbody></table></div>")
    if combined["samples"]:
        body.append(samples_panel(combined, colours))
    return document(title, body)


def colours_of(entries: Sequence[Entry]) -> dict[str, str]:
    """A colour an entry, the same everywhere; more than six are shades between two."""
    if len(entries) <= len(COLOURS):
        return {entry.label: f"var(--{colour})" for entry, colour in zip(entries, COLOURS, strict=False)}
    last = len(entries) - 1
    return {entry.label: f"color-mix(in oklab, var(--student) {round(100 * i / last)}%, var(--teacher))" for i, entry in enumerate(entries)}


def _contents(entries: Sequence[Entry], colours: dict[str, str]) -> str:
    rows = []
    for entry in entries:
        what = "run" if entry.whole else f"{entry.stages[0].kind} stage {entry.stages[0].name}" + " (a cell of its grid)" * entry.cell
        states = dict.fromkeys(str(stage.record.get("status", "?")) for stage in entry.stages) or {"not started": None}
        cells = [
            what, entry.run.name, ", ".join(states), f"{sum(stage.tokens for stage in entry.stages):,}",
            duration(sum(stage.record.get("seconds") or 0 for stage in entry.stages)), seed_of(entry), str(entry.run.environment.get("started", "–")),
        ]  # fmt: skip
        key = f'<span style="color:{colours[entry.label]}"><i class="key"></i></span>'
        rows.append(f"<tr><td style=\"white-space:nowrap\">{key}{escape(entry.label)}</td>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{word}</th>" for word in ("", "is a", "of run", "status", "tokens trained", "time", "seed", "started"))
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _differences(comparison: Comparison) -> str:
    if not comparison.differences:
        return "<p class='note'>Nothing: their recipes are the same.</p>"
    head = "".join(f"<th>{escape(entry.label)}</th>" for entry in comparison.entries)
    rows = "".join(
        f"<tr><td>{escape(path)}</td>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>" for path, cells in comparison.differences
    )
    return f'<div class="wide"><table class="texts-table"><thead><tr><th>setting</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _measures(comparison: Comparison) -> str:
    rows, group = [], None
    for line in comparison.lines:
        if line.group != group:
            group = line.group
            rows.append(f'<tr class="group"><td colspan="{len(line.cells) + 1}">{escape(group)}</td></tr>')
        cells = []
        for i, cell in enumerate(line.cells):
            change = f" <small>{escape(line.change(i))}</small>" if line.change(i) else ""
            cells.append(f"<td{' class=best' if i == line.best else ''}>{escape('–' if cell is None else cell.cell)}{change}</td>")
        rows.append(f"<tr><td>{escape(line.name)}</td>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(entry.label)}</th>" for entry in comparison.entries)
    first = escape(comparison.entries[0].label)
    return (
        f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        f"<p class='note'>Small: beside {first} (× a ratio, pt percentage points, else a difference). Bold: the best, where better is known.</p>"
    )


# -- curves ------------------------------------------------------------------------------------------------------------------


def curves(entries: Sequence[Entry], colours: dict[str, str], axis: str) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """``(heading, figures)`` of every stage that at least two entries trained: runs by the stage's name, or by their main stages."""
    groups: list[tuple[str, dict[str, tuple[Entry, Stage]]]] = []
    if all(entry.whole for entry in entries):
        for name in dict.fromkeys(stage.name for entry in entries for stage in entry.stages if stage.metrics):
            members = {entry.label: (entry, stage) for entry in entries if (stage := entry.run.stage(name)) is not None and stage.metrics}
            groups.append((f"Training: {name}", members))
    if not any(len(members) > 1 for _, members in groups):
        groups.append(("Training", {entry.label: (entry, entry.main) for entry in entries if entry.main is not None and entry.main.metrics}))
    shown = [(heading, _figures(members, colours, axis)) for heading, members in groups if len(members) > 1]
    return [(heading, figures) for heading, figures in shown if figures]


def _figures(members: dict[str, tuple[Entry, Stage]], colours: dict[str, str], axis: str) -> list[tuple[str, str, str]]:
    lines = {label: _metrics(stage, axis) for label, (_, stage) in members.items()}
    order = ["loss", *NAMES]
    keys = dict.fromkeys(key for found in lines.values() for key in found)
    figures = []
    for key in sorted(keys, key=lambda key: order.index(key) if key in order else len(order)):
        having = {label: found[key] for label, found in lines.items() if key in found}
        values = [y for training, held_out in having.values() for _, y in (*training, *held_out)]
        if len(having) < 2 or (key == "teacher_share" and not any(values)):
            continue
        series = []
        for label, (training, held_out) in having.items():
            series += [Series(label, thin(training)[0], colours[label])] if training else []
            series += [Series(f"{label}, held out", held_out, colours[label], dashed=True, markers=True)] if held_out else []
        title, note = NAMES.get(key, (key.replace("_", " "), ""))
        form: Callable[[float], str] = percent if key in SHARES else number
        if key == "loss":
            note = _loss_note([members[label] for label in having])
        chart = line_chart(series, x_label=axis, y_label=title, log_y=form is number and log_is_useful(series), y_format=form)
        named = [one for one in series if not one.dashed] or series
        figures.append((title, note, chart + legend(named)))
    return figures


def _loss_note(members: Sequence[tuple[Entry, Stage]]) -> str:
    """What a common axis of losses is worth."""
    objectives = [stage.options.get("objectives") for _, stage in members]
    if any(one != objectives[0] for one in objectives):
        return "sums of different objectives: shapes, not heights"
    texts = [data_of(entry.run, stage) for entry, stage in members]
    return "on different text or tokens" if any(one != texts[0] for one in texts) else ""


def _metrics(stage: Stage, axis: str) -> dict[str, tuple[list[tuple[float, float]], list[tuple[float, float]]]]:
    """``{measure: (training points, held-out points)}`` over tokens or steps."""
    rows = [row for row in stage.metrics if "loss" in row]
    where = _axis(rows, axis)
    found: dict[str, tuple[list[tuple[float, float]], list[tuple[float, float]]]] = {}
    for row in stage.metrics:
        for key, value in row.items():
            name = key.removeprefix("validation/")
            if isinstance(value, bool) or not isinstance(value, int | float) or "/" in name or name in MACHINERY - {"loss"}:
                continue
            found.setdefault(name, ([], []))[name != key].append((where(row["step"]), float(value)))
    return found


def _axis(rows: Sequence[dict[str, Any]], axis: str) -> Callable[[int], float]:
    """Step -> place on the axis: tokens between logged steps lie on a straight line."""
    known = sorted({row["step"]: float(row.get("tokens", 0)) for row in rows}.items())
    steps = [step for step, _ in known]

    def tokens(step: int) -> float:
        i = bisect_left(steps, step)
        if i < len(known) and known[i][0] == step:
            return known[i][1]
        low, high = (known[i - 1] if i else (0, 0.0)), (known[i] if i < len(known) else known[-1])
        return low[1] if high[0] == low[0] else low[1] + (step - low[0]) / (high[0] - low[0]) * (high[1] - low[1])

    return float if axis == "steps" or not known else tokens


# -- evaluations -------------------------------------------------------------------------------------------------------------


def _combined(entries: Sequence[Entry]) -> dict[str, Any]:
    """One evaluation of which every entry is a model: for the charts and the samples that all of them have."""
    having = [(entry.label, *entry.evaluation) for entry in entries if entry.evaluation]
    combined: dict[str, Any] = {"teacher": None, "models": {label: results["models"][column] for label, results, column in having}}
    for measure in ("recall", "cache", "speed"):
        combined[measure] = {label: results[measure][column] for label, results, column in having if column in results.get(measure, {})}
    texts: dict[str, dict[str, str]] = {}
    for label, results, column in having:
        for sample in results.get("samples", ()):
            if column in sample["continuations"]:
                texts.setdefault(sample["prompt"], {})[label] = sample["continuations"][column]
    combined["samples"] = [{"prompt": prompt, "continuations": found} for prompt, found in texts.items() if len(found) > 1]
    combined["setting"] = having[0][1].get("setting", {}) if having else {}
    return combined
