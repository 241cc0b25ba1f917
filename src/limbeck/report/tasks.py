"""What lm-evaluation-harness measured, for page and card."""

from __future__ import annotations

from typing import Any

from limbeck.config.redact import redacted_text
from limbeck.evaluation.table import percent
from limbeck.report.run import Run, Stage


def task_stages(run: Run) -> list[Stage]:
    """Stages whose model was run on tasks."""
    return [stage for stage in run.stages if stage.tasks and stage.tasks.get("tasks")]


def task_notes(results: dict[str, Any]) -> list[str]:
    """What was measured, and all that makes its numbers others than a whole run of the same tasks would give."""
    settings = results.get("settings", {})
    against = results.get("against")
    lines = [f"lm-evaluation-harness {results.get('harness', '?')}, weights in {settings.get('dtype', '?')}."]
    if against:
        lines.append(f"The column teacher is {redacted_text(str(against))}.")
    limit = settings.get("limit")
    if limit:
        part = percent(limit) if limit < 1 else f"{int(limit)} documents"
        lines.append(f"Only {part} of each task: these are no results to compare with other people's.")
    if settings.get("chat_template"):
        lines.append("Asked in the chat template.")
    read = len(settings.get("condition") or ())
    if settings.get("named"):
        lines.append(f"The LoRA was made from the condition {settings['named']}.")
    elif read:
        lines.append(f"The LoRA was made from {read} text{'s' * (read > 1)}, the same for all tasks.")
    return lines
