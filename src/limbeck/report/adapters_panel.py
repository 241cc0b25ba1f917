"""The page's panel of a LoRA generator: tables and charts of its evaluation beside every control."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from limbeck.evaluation.table import count as quantity
from limbeck.evaluation.table import percent
from limbeck.report.adapters import (
    BASE,
    SPLITS,
    TEACHER,
    Column,
    Judgement,
    command,
    facts,
    judgements,
    loss_words,
    notes,
    share,
    signed,
    tiles,
    warnings,
)
from limbeck.report.dots import Case, Dot, dot_legend, interval_chart, sorted_chart
from limbeck.report.svg import number

WIDE = 480
SHARE_LIMITS = (-1.0, 2.0)
"""Shares beyond these are arrows: one hopeless merge must not squeeze all others together."""
NAMES, COLOURS = ("base", "generated", "own teacher"), ("var(--plain)", "var(--student)", "var(--teacher)")
FOLDED = "<details style='margin-top:16px'>"
TRAINED = "trained on the mix"


def adapters_panel(judged: Judgement) -> str:
    """Everything that an `evaluate_adapters` stage found."""
    parts = [f"<h2>Generated adapters: {escape(judged.stage.name)}</h2>"]
    parts += [f'<p class="note">{escape(warning)}</p>' for warning in warnings(judged)]
    if judged.stage is not judgements(judged.run)[-1].stage:
        # The header has the last one's.
        parts.append(tile_row(tiles(judged)))
    listed = "".join(f"<dt>{escape(label)}</dt><dd>{escape(words)}</dd>" for label, words in facts(judged.run, judged.generator))
    parts.append(f"<h3>The generator: {escape(judged.generated)}</h3><dl>{listed}</dl>{adapter_map(judged)}")
    parts += [_split(judged, split) for split in judged.splits]
    parts.append(_meanings(judged))
    if judged.results.get("composition"):
        parts.append(_composition(judged.results["composition"]))
    parts.append(f"{FOLDED}<summary>Every condition</summary>{_conditions(judged)}</details>")
    parts.append(f"<h3>Write an adapter</h3><pre>{escape(command(judged.generated))}</pre>")
    return "".join(parts)


def adapter_map(judged: Judgement) -> str:
    """Which Linears of which layers the LoRA changes, and by how many numbers: a row a site, a column a layer."""
    stage = judged.generator
    spec = ((stage.generator if stage else None) or {}).get("spec")
    if not spec or not spec["sites"]:
        return ""
    layers = range(max(layer for site in spec["sites"] for layer in site["layers"]) + 1)
    numbers = [spec["rank"] * (site["in_features"] + site["out_features"]) for site in spec["sites"]]
    rows = []
    for site, held in zip(spec["sites"], numbers, strict=True):
        share = 45 * held / max(numbers)
        cells = (
            f'<td style="--share:{share:.0f}%" title="{escape(site["name"])}, layer {layer}">{quantity(held)}</td>' if layer in site["layers"] else "<td></td>"
            for layer in layers
        )
        rows.append(f"<tr><td>{escape(site['name'])}</td>{''.join(cells)}</tr>")
    head = "".join(f"<th>{layer}</th>" for layer in layers)
    table = f'<table class="ranks"><thead><tr><th>layer</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f"<h3>Where the LoRA acts</h3><p class='note'>Numbers that it has there; empty where the base stays as it is.</p><div class='wide'>{table}</div>"


def tile_row(tiles: Iterable[tuple[str, str, str]]) -> str:
    """Numbers in a row, each with a label above and an explanation below."""
    cells = (
        f'<div class="tile"><span>{escape(label)}</span><strong>{escape(value)}</strong><span>{escape(note)}</span></div>'
        for label, value, note in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _split(judged: Judgement, split: str) -> str:
    said = " ".join(notes(judged, split))
    note = f'<p class="note">{escape(said)}</p>' if said else ""
    number, title = judged.split(split)["conditions"], SPLITS.get(split, split.replace("_", " "))
    heading = f"{title[0].upper()}{title[1:]}: {number}" if split == "seen" else f"{title[0].upper()}{title[1:]}: {number} condition{'s' * (number != 1)}"
    return f"<h3>{escape(heading)}</h3>{note}{_table(judged, split)}{_figures(judged, split)}"


def _table(judged: Judgement, split: str) -> str:
    """A row a column, best first; the best loss but the own teachers' is bold."""
    found = judged.split(split)
    columns = judged.columns(split)
    measures = [(kind, label) for kind, label in MEASURES if kind in found]
    contest = [found["nll"][c.key] for c in columns if c.key != TEACHER and math.isfinite(found["nll"][c.key])]
    rows = []
    for column in columns:
        loss = found["nll"][column.key]
        best = " class=best" if contest and loss == min(contest) and column.key != TEACHER else ""
        cells = [f"<td{best}>{loss_words(loss)}</td>", f"<td>{escape(share(judged, split, column.key))}</td>", f"<td>{_lead(found, column)}</td>"]
        cells += [f"<td>{_ratio(found[kind].get(column.key))}</td>" for kind, _ in measures]
        rows.append(f'<tr><td style="white-space:nowrap" title="{escape(column.meaning)}">{_name(column, judged)}</td>{"".join(cells)}</tr>')
    head = ["", "loss", "share of gain", "generated leads by [95%]", *(label for _, label in measures)]
    return wide_table(head, rows)


MEASURES = (("delta_cosine", "delta cosine"), ("delta_ratio", "delta size"), ("size_ratio", "dW size"))


def _lead(found: dict[str, Any], column: Column) -> str:
    """How much less the generated adapter loses than this column, with its interval."""
    if column.key not in found["lead"]:
        return ""
    mean, low, high = found["lead"][column.key]
    known = found["conditions"] > 1 and math.isfinite(low) and math.isfinite(high)
    return f"{signed(mean)} [{signed(low)}, {signed(high)}]" if known else signed(mean)


def _name(column: Column, judged: Judgement) -> str:
    return f"<strong>{escape(column.name)}</strong>" if column.key == judged.generated else escape(column.name)


def _ratio(value: float | None) -> str:
    return f"{value:.3f}" if value is not None and math.isfinite(value) else "–"


def _figures(judged: Judgement, split: str) -> str:
    where = f"Conditions of this split, by the base's loss on them ({len(judged.rows(split))})"
    cases = [Case(str(row["name"]), tuple(row["nll"][key] for key in (BASE, judged.generated, TEACHER))) for row in judged.rows(split)]
    # From the least base loss on: a generated dot between the two others has part of the gain.
    chart = sorted_chart(cases, NAMES, COLOURS, width=WIDE, x_label=where, y_label="nats a token") + dot_legend(NAMES, COLOURS)
    title, note, first = _columns_chart(judged, split)
    figures = [(title, note, first), ("Loss of every condition", "nats a token", chart)]
    cells = (f"<figure><figcaption>{t}<small>{n}</small></figcaption>{c}</figure>" for t, n, c in figures)
    return f'<div class="figures two" style="margin-top:16px">{"".join(cells)}</div>'


def _columns_chart(judged: Judgement, split: str) -> tuple[str, str, str]:
    """``(title, note, chart)``: shares of the gain, or losses where there is no gain to share.

    The interval beside a column is that of its difference from the generated adapter (the lead), with the teachers' mean gain held
    fixed: a control whose interval ends left of the generated adapter's line is beaten.
    """
    found, gain, ours = judged.split(split), judged.gain(split), judged.generated
    shared = gain > 0 and math.isfinite(gain)

    def unit(loss: float) -> float:
        return (found["nll"][BASE] - loss) / gain if shared else loss

    dots = []
    for column in judged.columns(split):
        loss, lead = found["nll"][column.key], found["lead"].get(column.key)
        ends = sorted(unit(found["nll"][ours] + end) for end in lead[1:]) if lead and found["conditions"] > 1 else None
        text = share(judged, split, column.key) if shared else loss_words(loss)
        words = f"{column.name}: {loss_words(loss)} nats a token, {share(judged, split, column.key)} of the gain; {column.meaning}"
        colour = {ours: "student", TEACHER: "teacher"}.get(column.key, "ink" if column.control else "soft")
        dots.append(Dot(column.name, unit(loss), (ends[0], ends[1]) if ends else None, f"var(--{colour})", text, words, column.key == ours))
    own = unit(found["nll"][ours])
    marks = [(own, "generated")] if math.isfinite(own) and (not shared or SHARE_LIMITS[0] <= own <= SHARE_LIMITS[1]) else []
    chart = interval_chart(
        dots, width=WIDE, x_label="share of the own teachers' gain over the base" if shared else "loss, nats a token",
        x_format=(lambda x: f"{100 * x:.0f}%") if shared else number, marks=marks, limits=SHARE_LIMITS if shared else None,
    )  # fmt: skip
    note = "lines: 95% of the difference from the generated one" if found["conditions"] > 1 else "one condition, no intervals"
    return ("Share of the teacher's gain" if shared else "Mean loss"), note, chart


def _meanings(judged: Judgement) -> str:
    """What each row of the tables is."""
    known = {column.key: column for split in judged.splits for column in judged.columns(split)}
    listed = "".join(f"<dt>{escape(c.name)}{' (control)' if c.control else ''}</dt><dd>{escape(c.meaning)}</dd>" for c in known.values())
    note = (
        "Loss: nats a token on test text. Share of gain: how much of what the own teachers gain over the base is kept, 100% being all. "
        "Generated leads by: the row's loss less that of the generated adapter, with the interval of a paired bootstrap over conditions. "
        "Delta: the change of hidden states on probe texts, its cosine to the own teacher's and its size over it; dW: the change of the "
        "weights, likewise."
    )
    return f"{FOLDED}<summary>What the rows are</summary><dl>{listed}</dl><p class='note'>{note}</p></details>"


def _composition(found: dict[str, Any]) -> str:
    """Mixed conditions: losses on the mix and on either part, and whether deltas add up."""
    mixes, texts = found["mixes"], list(found["nll"])
    names = list(found["nll"][texts[0]]) if texts else []
    best = {text: min((v for k, v in found["nll"][text].items() if k != TRAINED and math.isfinite(v)), default=None) for text in texts}
    rows = []
    for name in names:
        cells = (
            f"<td{' class=best' if name != TRAINED and found['nll'][text][name] == best[text] else ''}>{loss_words(found['nll'][text][name])}</td>"
            for text in texts
        )
        rows.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    additive = sum(mix["additive"] for mix in mixes)
    note = (
        f"In {additive} of {len(mixes)} mixes ({percent(found['additive'])}) the delta of the teacher trained on the mix is nearer to the sum of its parts' "
        "deltas than to either. Loss in nats a token on the mix's text and on its parts' own; bold: best but the one trained on the mix."
    )
    details = f"{FOLDED}<summary>Every mix</summary>{_mixes(mixes)}</details>"
    return f"<h3>Two tasks at once</h3><p class='note'>{note}</p>{wide_table(['', *(f'on the {text}' for text in texts)], rows)}{details}"


def _mixes(mixes: Sequence[dict[str, Any]]) -> str:
    rows = []
    for mix in mixes:
        cosines = [mix["cosine_sum"], *mix["cosine_parts"], mix["cosine_generated"]]
        cells = "".join(f"<td>{_ratio(value)}</td>" for value in cosines)
        rows.append(f"<tr><td>{escape(mix['name'])}</td>{cells}<td>{'yes' if mix['additive'] else 'no'}</td></tr>")
    return wide_table(["cosine of the mix's delta to", "sum of parts", "first part", "second part", "generated", "adds up"], rows)


def _conditions(judged: Judgement) -> str:
    ours, rows = judged.generated, []
    for split in judged.splits:
        rows.append(f'<tr class="group"><td colspan="7">{escape(SPLITS.get(split, split.replace("_", " ")))}</td></tr>')
        for row in sorted(judged.rows(split), key=lambda row: str(row["name"])):
            base, generated, teacher = (row["nll"][key] for key in (BASE, ours, TEACHER))
            kept = percent((base - generated) / (base - teacher)) if base - teacher > 0 and math.isfinite(generated) else "–"
            cells = "".join(f"<td>{loss_words(value)}</td>" for value in (base, generated, teacher))
            others = "".join(f"<td>{escape(str(row.get(key, '–')))}</td>" for key in ("nearest", "shuffled"))
            rows.append(f"<tr><td>{escape(str(row['name']))}</td>{cells}<td>{kept}</td>{others}</tr>")
    return wide_table(["condition", "base", "generated", "own teacher", "share of gain", "nearest seen", "wrong condition"], rows)


def wide_table(head: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls on a narrow page; ``rows`` are ``<tr>`` elements."""
    cells = "".join(f"<th>{escape(word)}</th>" for word in head)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
