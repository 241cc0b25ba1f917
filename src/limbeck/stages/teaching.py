"""Teachers put together from their options: those that stand in front of others included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from limbeck.config.address import shown
from limbeck.config.base import From
from limbeck.config.parts.teachers import TEACHERS
from limbeck.errors import RunError, TeacherError
from limbeck.models.loading import load_tokenizer
from limbeck.models.vocabulary import compare_vocabularies, vocabulary_digest
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


def check_teacher_vocabulary(teacher: Any, tokenizer: Any) -> None:
    """Refuse a loaded teacher, or one that it stands in front of, that means other tokens by the data's ids.

    Token strings are compared; a served teacher, where it says which it means, gives their digest.
    """
    for part in parts_of(teacher):
        if hasattr(part, "source"):
            compare_vocabularies(tokenizer, load_tokenizer(part.source), names=("the data", f"the teacher {part.source}"))
        served = getattr(getattr(part, "findings", None), "tokenizer", None)
        if served is not None and served != (ours := vocabulary_digest(tokenizer)):
            raise TeacherError(
                f"the teacher at {shown(part.options.url)} has another vocabulary than the data (digest {served[:12]} there, {ours[:12]} here): its ids "
                "mean other tokens; prepare the data with the teacher's own tokenizer, or serve a teacher of the same one"
            )


def tell_domains(teacher: Any, domains: Sequence[str]) -> None:
    """Give a mixture the names of the data's domains."""
    if hasattr(teacher, "domains"):
        teacher.domains = domains


def parts_of(teacher: Any) -> Iterator[Any]:
    """A teacher and those that it stands in front of."""
    if teacher is not None:
        yield teacher
        for inner in [getattr(teacher, "inner", None), *getattr(teacher, "teachers", {}).values()]:
            yield from parts_of(inner)
