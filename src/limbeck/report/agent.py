"""A generator judged on agents' trajectories: the table for page and card."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from limbeck.report.adapters_panel import wide_table
from limbeck.report.run import Run, Stage

SPLITS = {"held_out_source": "Held-out repositories", "seen": "Repositories trained on"}
PARTS = (("name", "name"), ("keys", "argument names"), ("values", "argument values"))


def agent_stages(run: Run) -> list[Stage]:
    """Every finished evaluation on trajectories."""
    return [stage for stage in run.stages if (stage.agent or {}).get("splits")]


def tables(stage: Stage) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """``(title, head, rows)`` of each split, held-out ones first."""
    results = stage.agent or {}
    for split in sorted(results["splits"], key=lambda name: list(SPLITS).index(name) if name in SPLITS else len(SPLITS)):
        found = results["splits"][split]
        title = f"{SPLITS.get(split, split)}: {found['conditions']} issue{'s' * (found['conditions'] != 1)}"
        calls = [(kind, words) for kind, words in (("calls_forced", "forced"), ("calls_written", "written")) if kind in found]
        head = ["", "loss", *(["KL to teacher", "agreement"] if "kl" in found else []), f"{results['generated']} leads in {found['lead_of']} by [95%]"]
        head += [f"{label} ({words})" for _, words in calls for _, label in PARTS]
        yield title, head, [_row(found, name, [kind for kind, _ in calls]) for name in found["nll"]]


def _row(found: dict[str, Any], name: str, calls: list[str]) -> list[str]:
    cells = [name, f"{found['nll'][name]:.4f}"]
    if "kl" in found:
        cells += [f"{found['kl'][name]:.4f}", f"{found['agreement'][name]:.1%}"]
    lead = found["lead"].get(name)
    cells.append(f"{lead[0]:+.4f} [{lead[1]:+.4f}, {lead[2]:+.4f}]" if lead else "")
    for kind in calls:
        rates = found[kind].get(name, {})
        cells += [f"{rates[part]:.0%}" if part in rates else "–" for part, _ in PARTS]
    return cells


MEANING = (
    "Losses and KL in nats a token of what the assistant says. base: the frozen model; shuffled: the LoRA generated from another issue. Tool calls are "
    "right in their name, the set of argument names, and each value: forced after the true words before every token, or written by the model itself."
)


def agent_panel(stage: Stage) -> str:
    """The section of the page."""
    parts = [f"<h2>On trajectories: {escape(stage.name)}</h2><p class='note'>{escape(MEANING)}</p>"]
    for title, head, rows in tables(stage):
        cells = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        parts.append(f"<h3>{escape(title)}</h3>{wide_table(head, cells)}")
    return "".join(parts)


def agent_lines(stage: Stage) -> list[str]:
    """The section of the card."""
    lines = [f"## On trajectories: {stage.name}", "", MEANING, ""]
    for title, head, rows in tables(stage):
        lines += [f"{title}.", "", "| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        lines.append("")
    return lines
