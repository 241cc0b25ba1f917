"""What a ranking of layers shows: who put which layer where, what the choice is worth beside the controls, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from limbeck.evaluation.table import count as quantity
from limbeck.evaluation.table import percent
from limbeck.report.svg import Series, number

COLOURS = ("student", "teacher", "third", "fourth", "ink", "soft")
DARKEST = 0.55
"""Share of colour under the first place: words must be read on it, by day and by night."""
MANY_LAYERS = 16
"""From here on a table of scores is folded away."""


def ranking_panel(ranking: Mapping[str, Any]) -> str:
    """The words and tables of a ``ranking.json``; :func:`importance_series` are its lines."""
    kept, weight = ranking["keep"], ranking["recall_weight"]
    lead = (
        f"Softmax stays in layer{'s' * (len(kept) > 1)} {', '.join(map(str, kept))} of {ranking['num_layers']}, by {escape(ranking['method'])}. "
        f"Scores are the KL from the teacher in nats a token, {percent(1 - weight)} on text and {percent(weight)} on recall: lower is better."
    )
    parts = [f"<p class='note'>{lead}</p><h3>Place of every layer, by method</h3>{_places(ranking)}"]
    measured = {"zero_shot": "as they are restored", "distil": "after a short distillation"}[ranking["sets_measured"]]
    parts.append(f"<h3>Sets on data that no ranking has met, {measured}</h3>{_sets(ranking)}")
    if ranking["spearman"]:
        parts.append(f"<h3>Rank correlation between methods (Spearman)</h3>{_correlations(ranking)}")
    parts.append(f"<h3>Cost, in tokens</h3>{_cost(ranking)}")
    scores = _scores(ranking)
    if scores:
        opened = " open" if ranking["num_layers"] < MANY_LAYERS else ""
        parts.append(f"<details{opened}><summary>Scores by layer</summary>{scores}</details>")
    return "".join(parts)


def importance_series(ranking: Mapping[str, Any]) -> list[Series]:
    """A line a method: what a layer is worth to it, as a share of what its best layer is.

    A method that has no importances of its own but scores of trained candidates (``ga_s2``) counts from its worst candidate.  Methods
    that only put layers in order have no line.
    """
    series: list[Series] = []
    for name, method in ranking["methods"].items():
        worth = _importance(method, ranking["recall_weight"])
        best = max(worth.values(), default=0.0)
        if best > 0:
            points = [(float(layer), value / best) for layer, value in sorted(worth.items())]
            series.append(Series(name, points, f"var(--{COLOURS[len(series) % len(COLOURS)]})", markers=True))
    return series


def _importance(method: Mapping[str, Any], weight: float) -> dict[int, float]:
    if "importance" in method:
        return {int(layer): value for layer, value in method["importance"].items()}
    mixed = {int(layer): _mixed(_last(score), weight) for layer, score in method.get("scores", {}).items()}
    worst = max(mixed.values(), default=0.0)
    return {layer: worst - value for layer, value in mixed.items()}


def _last(score: Any) -> Mapping[str, Any]:
    """A score, or the last of those taken while a candidate trained."""
    found: Mapping[str, Any] = score[-1] if isinstance(score, list) else score
    return found


def _mixed(score: Mapping[str, Any], weight: float) -> float:
    return (1 - weight) * float(score["text"]) + weight * float(score["recall"])


def _table(head: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    cells = "".join(f"<th>{escape(word)}</th>" for word in head)
    style = f' class="{kind}"' if kind else ""
    return f'<div class="wide"><table{style}><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _places(ranking: Mapping[str, Any]) -> str:
    """A row a method, a column a layer: 1 is the first that it would keep; the darker, the earlier; outlined what it keeps."""
    layers, rows = ranking["num_layers"], []
    for name, method in ranking["methods"].items():
        place = {layer: i for i, layer in enumerate(method["order"], 1)}
        worth = _importance(method, ranking["recall_weight"])
        cells = []
        for layer in range(layers):
            if layer not in place:
                cells.append("<td>–</td>")
                continue
            words = f"{name}, layer {layer}" + (f": importance {number(worth[layer])}" if layer in worth else "")
            kept = " class=kept" if layer in method["keep"] else ""
            share = DARKEST * (1 - (place[layer] - 1) / layers)
            cells.append(f'<td{kept} style="--share:{100 * share:.0f}%" title="{escape(words)}">{place[layer]}</td>')
        chosen = " (chosen)" if name == ranking["method"] else ""
        rows.append(f"<tr><td>{escape(name)}{chosen}</td>{''.join(cells)}</tr>")
    return _table(["layer", *map(str, range(layers))], rows, "ranks")


def _sets(ranking: Mapping[str, Any]) -> str:
    """Best first; sets of equal layers are one row, with all their names."""
    names: dict[tuple[int, ...], list[str]] = {}
    found: dict[tuple[int, ...], Mapping[str, Any]] = {}
    oracle = ranking.get("oracle")
    for row in [*ranking["sets"], *([{"name": "oracle", **oracle}] if oracle else [])]:
        layers = tuple(row["layers"])
        names.setdefault(layers, []).append(row["name"])
        found[layers] = row
    best = min(row["score"] for row in found.values())
    lines = [
        (row["score"], _set_row(", ".join(names[layers]), row, oracle, row["score"] == best, list(layers) == ranking["keep"]))
        for layers, row in found.items()
    ]
    randoms = sum(row["name"].startswith("random ") for row in ranking["sets"])
    mean = ranking["random_mean"]
    lines.append((mean["score"], _set_row(f"mean of {randoms} random sets", mean, oracle, False, False)))
    head = ["set", "layers", "score", "KL, text", "KL, recall", "agreement", "recall"] + (["above the oracle"] if oracle else [])
    note = f"<p class='note'>The oracle is the best of all {len(oracle['sets'])} sets of this size.</p>" if oracle else ""
    return _table(head, [line for _, line in sorted(lines, key=lambda line: line[0])]) + note


def _set_row(name: str, row: Mapping[str, Any], oracle: Mapping[str, Any] | None, best: bool, chosen: bool) -> str:
    words = [
        " ".join(map(str, row["layers"])) if "layers" in row else "–",
        number(row["score"]), number(row["kl"]), number(row["recall_kl"]),
        percent(row["agreement"]) if "agreement" in row else "–", percent(row["recall"]),
    ]  # fmt: skip
    if oracle:
        words.append(f"{100 * (row['score'] / oracle['score'] - 1):+.1f}%" if oracle["score"] > 0 else "–")
    cells = "".join(f"<td{' class=best' if best and i == 1 else ''}>{escape(word)}</td>" for i, word in enumerate(words))
    label = f"<strong>{escape(name)}</strong> (chosen)" if chosen else escape(name)
    return f"<tr><td>{label}</td>{cells}</tr>"


def _correlations(ranking: Mapping[str, Any]) -> str:
    methods = list(ranking["methods"])
    rows = []
    for one in methods:
        cells = []
        for other in methods:
            value = ranking["spearman"].get(f"{one}, {other}", ranking["spearman"].get(f"{other}, {one}"))
            cells.append("<td></td>" if value is None else f"<td>{value:+.2f}</td>")
        rows.append(f"<tr><td>{escape(one)}</td>{''.join(cells)}</tr>")
    return _table(["", *methods], rows)


def _cost(ranking: Mapping[str, Any]) -> str:
    """What each method read: by the teacher, in training, in scoring; ``full`` is the price of the same without sharing and stopping early."""
    rows, full = [], any("full_tokens" in method for method in ranking["methods"].values())
    for name, method in ranking["methods"].items():
        cells = "".join(f"<td>{quantity(method['tokens'][key])}</td>" for key in ("teacher", "trained", "scored", "all"))
        if full:
            whole = method.get("full_tokens")
            cells += f"<td>{quantity(whole['all'])}</td>" if whole else "<td>–</td>"
        rows.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    head = ["method", "teacher", "trained", "scored", "all"] + (["every candidate to the end"] if full else [])
    total = ranking["tokens"]
    words = f"This stage: {quantity(total['all'])}, of which {quantity(total['ranking'])} for rankings, {quantity(total['sets'])} to compare sets"
    return (
        _table(head, rows)
        + f"<p class='note'>{words} and {quantity(total['teacher'])} through the teacher. Passes that methods share are paid once.</p>"
    )


def _scores(ranking: Mapping[str, Any]) -> str:
    """Text and recall, both parts of every score, a column pair a method."""
    scored = {name: method["scores"] for name, method in ranking["methods"].items() if method.get("scores")}
    if not scored:
        return ""
    rows = []
    for layer in range(ranking["num_layers"]):
        cells = []
        for scores in scored.values():
            score = scores.get(str(layer))
            cells += (
                ["<td>–</td>"] * 2 if score is None else [f"<td>{number(_last(score)[part])}</td>" for part in ("text", "recall")]
            )
        rows.append(f"<tr><td>layer {layer}</td>{''.join(cells)}</tr>")
    note = "<p class='note'>Of residual: relative errors of the mixers, not KL.</p>" if "residual" in scored else ""
    return _table(["", *(f"{name}, {part}" for name in scored for part in ("text", "recall"))], rows) + note
