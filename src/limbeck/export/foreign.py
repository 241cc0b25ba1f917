"""Students that only Limbeck's own module graph computes: said before anything is written."""

from __future__ import annotations

from typing import Any

from limbeck.errors import ModelError
from limbeck.models.limbeck_model import surgeries_of


def check_foreign(config: Any, form: str) -> None:
    """Raise :class:`ModelError` for a student whose surgeries no other program's graph has a place for.

    Options of a surgery say so by ``foreign``, a reason or None.
    """
    reasons = [reason for surgery in surgeries_of(config) if (reason := getattr(surgery.options, "foreign", None))]
    if reasons:
        raise ModelError(f"export --to {form}: {'; '.join(reasons)}. `--to hf` writes any student")
