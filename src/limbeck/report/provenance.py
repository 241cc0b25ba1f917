"""What a run was made with and from, for page and card: from its records, without secrets."""

from __future__ import annotations

import json
import re
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


def hub_base(run: Run) -> str | None:
    """The first base that has the form of a hub's name."""
    for options in run.recipe.get("stages", {}).values():
        base = (options.get("student") or {}).get("base")
        if isinstance(base, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", base):
            return base
    return None


def licence(run: Run) -> dict[str, str]:
    """The entries on its licence that a base's card had when it was trained on; empty where none is known."""
    for stage in run.stages:
        known = stage.record.get("made_from")
        found = known.get("licence") if isinstance(known, dict) else None
        if isinstance(found, dict) and found:
            return {str(key): str(value) for key, value in found.items()}
    return {}


def _words(value: Any) -> str:
    """A fingerprint in words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items() if item is not None)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
