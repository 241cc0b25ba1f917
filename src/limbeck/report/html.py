"""One run as one page: no network, no scripts, nothing that is not in the run directory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

from limbeck.config.redact import redacted
from limbeck.evaluation.harness_table import harness_rows
from limbeck.evaluation.table import Row, comparison_rows, contexts, recall_at, recall_points, size
from limbeck.evaluation.table import count as quantity
from limbeck.evaluation.table import tokens as token_count
from limbeck.files import write_atomically
from limbeck.report.adapters import judgements, sentence, tiles, unjudged
from limbeck.report.adapters_panel import adapters_panel, tile_row
from limbeck.report.agent import agent_panel, agent_stages
from limbeck.report.card import model_card
from limbeck.report.curves import training_figures
from limbeck.report.provenance import made_from, made_with, safe_command
from limbeck.report.ranking import importance_series, ranking_panel
from limbeck.report.run import Run, Stage, became, key_numbers, read_run
from limbeck.report.style import STYLE
from limbeck.report.svg import Series, legend, line_chart, number
from limbeck.report.tasks import task_notes, task_stages

CARD = "model_card.md"
WIDE = 480
"""Units across a chart of the evaluation, which stand two in a row; those of training stand three."""


def write_report(run_dir: str | PathLike[str]) -> Path:
    """Write ``report.html`` and ``model_card.md`` into a run directory, from what exists there.  Returns the page's path.

    ``limbeck.write_report("runs/hybrid")``

    Raises:
        CheckpointError: not a run directory, or a damaged file in it.
    """
    run = read_run(Path(run_dir))
    path = run.path / "report.html"
    write_atomically(path, page(run))
    write_atomically(run.path / CARD, model_card(run))
    return path


def page(run: Run) -> str:
    """The whole page."""
    body = [_header(run)]
    for stage in run.stages:
        if stage.evaluation:
            body.append(_evaluation(stage))
    body += [_tasks(stage) for stage in task_stages(run)]
    body += [adapters_panel(judged) for judged in judgements(run)]
    body += [agent_panel(stage) for stage in agent_stages(run)]
    for stage in run.stages:
        if stage.ranking:
            body.append(_ranking(stage.name, stage.ranking))
        if stage.metrics:
            facts = f"{quantity(stage.tokens)} tokens, {duration(stage.record.get('seconds'))}"
            body.append(f"<h2>Training: {escape(stage.name)}</h2><p class='note'>{facts}</p>{figure_grid(training_figures(stage))}")
        if stage.grid:
            body.append(f"<h2>Grid: {escape(stage.name)}</h2>{grid_table(stage.grid)}")
    body += [samples_panel(stage.evaluation, model_colours(stage)) for stage in run.stages if stage.evaluation and stage.evaluation.get("samples")]
    body.append(_provenance(run))
    return document(run.name, body)


def document(title: str, body: Iterable[str]) -> str:
    """A page of sections: everything in one file."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)} · Limbeck</title><style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def model_colours(stage: Stage) -> dict[str, str]:
    """A colour a model: the same in every chart and sample of one evaluation."""
    results, spare, colours = stage.evaluation or {}, ["third", "fourth", "ink"], {}
    for name in results["models"]:
        fixed = {results.get("teacher"): "teacher", results["student"]: "student", "copy_init": "plain"}
        colours[name] = f"var(--{fixed.get(name) or (spare.pop(0) if spare else 'soft')})"
    return colours


def _header(run: Run) -> str:
    parts = ['<p class="brow">Limbeck run</p>', f"<h1>{escape(run.name)}</h1>"]
    stage = run.evaluated
    if stage is not None:
        parts.append(f'<p class="lead">{escape(became(stage.evaluation or {}))}</p>')
    judged = judgements(run)
    if judged:
        parts.append(f'<p class="lead">{escape(sentence(judged[-1]))}</p>')
    if run.recipe.get("description"):
        parts.append(f'<p class="note">{escape(run.recipe["description"])}</p>')
    if unjudged(run):
        names = ", ".join(one.name for one in unjudged(run))
        parts.append(f'<p class="note">No evaluate_adapters stage has judged {escape(names)}: there are training curves only.</p>')
    shown = key_numbers(stage.evaluation or {}) if stage else []
    if judged:
        shown += tiles(judged[-1])
    trained = [s for s in run.stages if s.metrics]
    if trained:
        seconds = sum(s.record.get("seconds") or 0 for s in trained)
        note = f"tokens in {duration(seconds)}, {len(trained)} stage{'s' * (len(trained) > 1)}"
        shown.append(("trained on", quantity(sum(s.tokens for s in trained)), note))
    if stage is not None:
        parts.append(_strip(stage))
    return f"<header>{''.join(parts)}{tile_row(shown)}</header>"


def _strip(stage: Stage) -> str:
    """One square a layer, so that a glance shows what was replaced."""
    models, kinds, rows = (stage.evaluation or {})["models"], [], []
    for name, facts in models.items():
        cells = []
        for i, kind in enumerate(facts["layers"]):
            if kind not in kinds:
                kinds.append(kind)
            cells.append(f'<i class="{"softmax" if kind == "softmax" else "mixer"}" title="layer {i}: {escape(kind)}"></i>')
        rows.append(f"<span>{escape(name)}</span><div>{''.join(cells)}</div>")
    keys = "".join(f'<span><i class="{"softmax" if k == "softmax" else "mixer"}"></i>{escape(k)}</span>' for k in kinds)
    return f'<div class="strip">{"".join(rows)}</div><p class="kinds">{keys}one square a layer, the first on the left</p>'


def _evaluation(stage: Stage) -> str:
    results = stage.evaluation or {}
    setting = results.get("setting", {})
    note = (
        f"Stage {escape(stage.name)}: {setting.get('rows', '?')} held-out rows of {setting.get('sequence', '?')} tokens, "
        f"{escape(str(setting.get('precision', '?')))} on {escape(str(setting.get('device', '?')))}. Bold: best of the students."
    )
    table = measures_table(comparison_rows(results), list(results["models"]))
    return f"<h2>Comparison</h2>{table}<p class='note'>{note}</p>{figure_grid(evaluation_figures(results, model_colours(stage)), 'figures two')}"


def measures_table(rows: Iterable[Row], names: Iterable[str]) -> str:
    """A row a measure, a column a model; each group has a line of its own."""
    lines, group = [], None
    for row in rows:
        if row.group != group:
            group = row.group
            lines.append(f'<tr class="group"><td colspan="{len(row.cells) + 1}">{escape(group)}</td></tr>')
        cells = "".join(f"<td{' class=best' if i == row.best else ''}>{escape(cell)}</td>" for i, cell in enumerate(row.cells))
        lines.append(f"<tr><td>{escape(row.measure)}</td>{cells}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    return f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _tasks(stage: Stage) -> str:
    results = stage.tasks or {}
    table = measures_table(harness_rows(results), list(results["models"]))
    return f"<h2>Tasks: {escape(stage.name)}</h2>{table}<p class='note'>{escape(' '.join(task_notes(results)))}</p>"


def evaluation_figures(results: dict[str, Any], colours: dict[str, str]) -> list[tuple[str, str, str]]:
    """``(title, note, chart)`` of what depends on a distance or a context: recall, cache, decode rate; a line a model."""
    figures = []
    for task in dict.fromkeys(task for task, _ in recall_points(results)):
        distances = [distance for name, distance in recall_points(results) if name == task]
        series = []
        for name, colour in colours.items():
            found = [(float(d), recall_at(results, name, task, d)) for d in distances]
            series.append(Series(name, [(d, a) for d, a in found if a is not None], colour, name == "copy_init", markers=True))
        chart = line_chart(
            series, width=WIDE, x_label="tokens back", y_label="accuracy", log_x=True, x_ticks=distances,
            y_range=(0, 1), y_format=lambda y: f"{100 * y:.0f}%",
        )  # fmt: skip
        figures.append((f"Recall: {task.replace('_', ' ')}", "accuracy by distance", chart + legend(series)))
    for measure, key, title, form, log in (
        ("cache", "bytes", "KV + state of one sequence", size, True),
        ("speed", "tokens_per_second", "Decode rate", number, False),
    ):
        known = contexts(results, measure)
        if not known:
            continue
        series = [
            Series(name, [(e["context"], e[key]) for e in results[measure][name]], colour, name == "copy_init", markers=True)
            for name, colour in colours.items()
            if name in results[measure]
        ]
        chart = line_chart(
            series, width=WIDE, x_label="context, tokens", y_label=title, log_x=True, log_y=log, x_ticks=known,
            y_range=None if log else (0, 1.08 * max(y for one in series for _, y in one.points)),
            y_ticks=_binary_ticks([y for one in series for _, y in one.points]) if log else None,
            x_format=lambda x: token_count(round(x)), y_format=form,
        )  # fmt: skip
        note = "16-bit keys and values, log scale" if log else "tokens a second, one sequence"
        figures.append((title, note, chart + legend(series)))
    return figures


def _ranking(name: str, ranking: dict[str, Any]) -> str:
    series = importance_series(ranking)
    figures = []
    if series:
        layers = range(ranking["num_layers"])
        ticks = [float(layer) for layer in layers if layer % math.ceil(len(layers) / 12) == 0]
        chart = line_chart(
            series, width=2 * WIDE, x_label="layer", y_label="importance", x_ticks=ticks, y_format=lambda y: f"{100 * y:.0f}%"
        )
        figures.append(("Importance", "share of the method's most important layer", chart + legend(series)))
    return f"<h2>Layer ranking: {escape(name)}</h2>{figure_grid(figures, 'figures one')}{ranking_panel(ranking)}"


def _binary_ticks(values: list[float]) -> list[float]:
    """Powers of four between the least and the largest: bytes read badly in powers of ten."""
    low, high = math.floor(math.log(min(values), 4)), math.ceil(math.log(max(values), 4))
    return [4.0**power for power in range(low, high + 1) if min(values) * 0.9 <= 4.0**power <= max(values) * 1.1]


def figure_grid(figures: Iterable[tuple[str, str, str]], layout: str = "figures") -> str:
    """Figures beside each other, each with its title and note."""
    cells = (
        f"<figure><figcaption>{escape(title)}<small>{escape(note)}</small></figcaption>{chart}</figure>"
        for title, note, chart in figures
    )
    return f'<div class="{layout}">{"".join(cells)}</div>'


def samples_panel(results: dict[str, Any], colours: dict[str, str]) -> str:
    """What the models wrote after the same prompts, side by side."""
    drawn = results.get("setting", {}).get("samples") or {}
    how = f"sampled at temperature {drawn['temperature']}" if drawn.get("temperature") else "greedy"
    underlined = "; underlined as far as it is the teacher's own text" if results.get("teacher") else ""
    parts = [f"<h2>Samples</h2><p class='note'>{how}{underlined}.</p>"]
    for sample in results["samples"]:
        reference = sample["continuations"].get(results.get("teacher"))
        texts = []
        for name, text in sample["continuations"].items():
            same = 0 if reference is None or name == results.get("teacher") else _common(reference, text)
            inner = f'<span class="same">{escape(text[:same])}</span>{escape(text[same:])}'
            colour = colours.get(name, "var(--soft)")
            texts.append(f'<div class="text" style="color:{colour}"><h4>{escape(name)}</h4><p>{inner}</p></div>')
        prompt = f'<p class="prompt">{escape(sample["prompt"])}</p>'
        parts.append(f'<div class="sample">{prompt}<div class="texts">{"".join(texts)}</div></div>')
    return "".join(parts)


def _common(a: str, b: str) -> int:
    """Length of the common beginning of two texts, 0 where it is blank."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return same if a[:same].strip() else 0


def grid_table(rows: list[dict[str, Any]]) -> str:
    """A row a cell of a grid, a column a setting or result."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = []
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        lines.append("".join(f"<td>{escape(number(c) if isinstance(c, float) else str(c))}</td>" for c in cells))
    body = "</tr><tr>".join(lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody><tr>{body}</tr></tbody></table></div>'


def _provenance(run: Run) -> str:
    stages = []
    for stage in run.stages:
        status = stage.record.get("status", "?")
        mark = "" if status == "finished" else " class=failed"
        trained = f"{stage.tokens:,}" if stage.tokens else ""
        stages.append(
            f"<tr><td>{escape(stage.name)}</td><td>{escape(stage.kind)}</td><td{mark}>{escape(status)}</td>"
            f"<td>{trained}</td><td>{duration(stage.record.get('seconds'))}</td></tr>"
        )
    versions = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in made_with(run))
    recipe = json.dumps(redacted(run.recipe), indent=2, ensure_ascii=False)
    command = f"<h3>Command</h3><pre>{escape(safe_command(run))}</pre>" if run.environment.get("command") else ""
    origins = made_from(run)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in origins)
    head = "<thead><tr><th>stage</th><th>data</th><th>tokenizer</th><th>teacher</th></tr></thead>"
    table = f"<h3>Made from</h3><div class='wide'><table class='texts-table'>{head}<tbody>{rows}</tbody></table></div>" if origins else ""
    return (
        "<h2>How this was made</h2>"
        "<div class='wide'><table><thead><tr><th>stage</th><th>kind</th><th>status</th><th>tokens</th><th>time</th></tr></thead>"
        f"<tbody>{''.join(stages)}</tbody></table></div>{command}"
        "<h3>Again, from this page alone</h3><p class='note'>Save the resolved recipe below as recipe.json; JSON is YAML.</p>"
        f"<pre>limbeck run recipe.json</pre><details><summary>Resolved recipe</summary><pre>{escape(recipe)}</pre></details>"
        f"{table}<h3>Made with</h3><dl>{versions}</dl>"
    )


def duration(seconds: float | None) -> str:
    """``3.5 s``, ``2 min 05 s``, ``1 h 20 min``."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    return f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
