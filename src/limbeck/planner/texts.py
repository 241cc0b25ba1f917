"""What a stage reads, as far as a recipe says it: rows, tokens of one pass, conditions.  Nothing is opened."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from limbeck.config.base import From
from limbeck.config.recipe import Recipe

TRAJECTORY_TOKENS = 45_000
"""Of a trajectory of nebius/SWE-rebench-openhands-trajectories: an estimate of 40 to 50 thousand from 64.3 turns in the mean."""
RESOLVED, ISSUES = 32_161, 3_792
"""Its trajectories that passed their tests, and the issues that they are of."""
ASSISTANT = 0.3
"""Share of a trajectory's tokens that the assistant says, on which alone losses stand: a quarter to a third."""


@dataclass(frozen=True)
class Text:
    """Rows of tokens."""

    sequence: int
    tokens: float | None = None
    """Of one pass over the training side; None where only the data itself would tell."""
    share: float = 1.0
    """Of the positions, those with a loss."""
    condition: tuple[int, int] = (1, 1)
    """Texts of a condition, and tokens of each, at most."""
    conditions: int = 0
    """Conditions; 0 for plain text."""
    note: str = ""
    """Where the number of tokens comes from."""


def text_of(recipe: Recipe, data: Any, tokens: float | None = None) -> Text:
    """The text behind a stage's ``data``; ``tokens`` is what a user says of one pass."""
    seen: set[str] = set()
    while isinstance(data, From) and data.from_ not in seen:
        seen.add(data.from_)
        stage = recipe.stages[data.from_]
        if stage.kind in ("prepare_conditions", "prepare_trajectories"):
            data = stage
            break
        data = stage.data
    text = _made(data)
    return text if tokens is None else replace(text, tokens=tokens, note="as --tokens says")


def _made(data: Any) -> Text:
    kind = getattr(data, "kind", None)
    if kind == "prepare_conditions":
        count = sum(source.slices.count for source in data.sources) * len(data.formats) + data.mixes + data.mixes_in_one_format
        return Text(data.sequence, None, condition=(data.condition.texts, data.condition.tokens), conditions=count)
    if kind == "prepare_trajectories":
        return _trajectories(data)
    kept = float(data.max_tokens) if data.max_tokens else None
    return Text(data.sequence, kept, note="data.max_tokens" if kept else "")


def _trajectories(data: Any) -> Text:
    text = Text(data.sequence, None, ASSISTANT, (1, data.condition.tokens), 1)
    if data.hub is None or "SWE-rebench-openhands" not in data.hub.path:
        return text
    count = min(RESOLVED, ISSUES * data.filters.per_instance) if data.filters.resolved else 67_074
    count = min(count, data.limit or count)
    held_out = data.held_out if isinstance(data.held_out, float) else 0.0
    # A window's room for turns of the one before is read again in every window but the first.
    again = 1 / (1 - data.overlap) if data.policy == "windows" and data.sequence < TRAJECTORY_TOKENS else 1.0
    tokens = count * TRAJECTORY_TOKENS * (1 - held_out) * again
    return replace(text, tokens=tokens, note=f"{count:,} trajectories of an estimated 45k tokens")
