"""Under which licence a base may be used: what its own card says, for the card of what becomes of it."""

from __future__ import annotations

from pathlib import Path

import yaml
from huggingface_hub import hf_hub_download

CARD = "README.md"
KEYS = ("license", "license_name", "license_link")
"""What the hub reads from the head of a card."""
_PATIENCE = 5.0
"""Seconds for the hub: no run waits for a card."""


def licence_of(source: str, revision: str | None = None) -> dict[str, str]:
    """The licence's entries of a model's card, by a folder's path or a hub name; none where there is no card, or it cannot be had."""
    try:
        folder = Path(source)
        card = folder / CARD if folder.is_dir() else Path(hf_hub_download(source, CARD, revision=revision, etag_timeout=_PATIENCE))
        head = _head(card.read_text(encoding="utf-8"))
    except Exception:  # Offline, no such file, a damaged head: a run is worth more than its card.
        return {}
    return {key: str(head[key]) for key in KEYS if isinstance(head.get(key), str)}


def _head(text: str) -> dict[str, object]:
    """The YAML between the two lines of dashes that a card begins with."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in (rest := [line.strip() for line in lines[1:]]):
        return {}
    found = yaml.safe_load("\n".join(lines[1 : 1 + rest.index("---")]))
    return found if isinstance(found, dict) else {}
