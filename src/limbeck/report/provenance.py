"""What a run was made with and from, for page and card: from its records, without secrets."""

from __future__ import annotations

import json
from typing import Any

from limbeck.config.redact import redacted, redacted_text, redacted_words
from limbeck.report.run import Run

FACTS = ("device", "machine", "commit", "started")


def made_with(run: Run) -> list[tuple[str, str]]:
    """``(name, value)``: where it ran, the code's commit where that is known, and versions."""
    environment = run.environment
    facts: dict[str, Any] = {key: environment[key] for key in FACTS if environment.get(key)} | environment.get("versions", {})
    return [(key, redacted_text(str(value))) for key, value in facts.items()]


def safe_command(run: Run) -> str:
    """The command that started it; one that an older version recorded may hold a secret."""
    return " ".join(redacted_words(str(run.environment.get("command", "")).split(" ")))


def made_from(run: Run) -> list[tuple[str, str, str, str]]:
    """``(stage, data, tokenizer, teacher)`` of every stage that trained: fingerprints as they were recorded."""
    rows = []
    for stage in run.stages:
        known = stage.record.get("made_from")
        if not isinstance(known, dict):
            continue
        fingerprint = redacted(known.get("teacher_fingerprint"))
        teacher = "none" if known.get("teacher") in (None, "none") else f"{known['teacher']}: {_words(fingerprint)}"
        rows.append((stage.name, str(known.get("data", "–")), str(known.get("tokenizer") or "–"), teacher))
    return rows


def _words(value: Any) -> str:
    """A fingerprint in words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items() if item is not None)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
