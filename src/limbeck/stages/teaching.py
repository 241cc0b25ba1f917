"""Teachers put together from their options: those that stand in front of others included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.config.base import From
from limbeck.config.parts.teachers import TEACHERS
from limbeck.errors import RunError
from limbeck.stages.context import StageContext


def build_teacher(context: StageContext, options: Any, *, num_ids: int | None = None) -> Any:
    """A teacher that is not the student's own base; nothing is loaded.

    ``num_ids`` is the number of ids of the data's tokenizer, over which a store keeps distributions.
    """
    if options.kind == "stored":
        inner = None if options.teacher is None else build_teacher(context, options.teacher)
        folder = signal_folder(context, options.signals)
        return TEACHERS.build(options, folder, inner, num_ids=num_ids, writer=context.world.rank)
    if options.kind == "mixture":
        return TEACHERS.build(
            options, {name: build_teacher(context, teacher, num_ids=num_ids) for name, teacher in options.teachers.items()}
        )
    return TEACHERS.build(options, context.locate(options.model) if options.kind == "local" else None)


def signal_folder(context: StageContext, signals: str | From) -> Path:
    """Where signals lie: a path from the recipe's folder, or a capture stage's artefact."""
    if not isinstance(signals, From):
        return (context.recipe_dir / signals).resolve()
    kind = context.stage_options(signals.from_).kind
    if kind != "capture":
        raise RunError(
            f"stage '{context.name}': teacher.signals.from names stage '{signals.from_}' of kind {kind}, which makes no signals; "
            "name a capture stage"
        )
    return context.artefact(signals.from_, "signals")
