"""What is checked of a stage that ranks layers before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.config.native import base_of, keeps_softmax, origin
from limbeck.errors import Problem

if TYPE_CHECKING:
    from limbeck.config.recipe import Recipe

BUILTIN = Path(__file__).resolve().parents[1] / "builtin"


def ranking_problems(recipe: Recipe) -> list[Problem]:
    """Rankings of students without mixers, or that keep as many layers as there are."""
    problems = []
    for name, stage in recipe.stages.items():
        if stage.kind != "rank_layers" or getattr(recipe.stages.get(stage.from_), "kind", None) != "train":
            continue
        student = origin(recipe, stage.from_)
        if student is None:
            continue
        if not any(surgery.kind == "hybridize" for surgery in student.surgery):
            message = f"the student of stage {stage.from_!r} has no mixers to rank: its surgery must be `hybridize`"
            problems.append(Problem("", f"stages.{name}.from", message))
        elif keeps_softmax(recipe, stage.from_):
            message = f"the student of stage {stage.from_!r} keeps softmax layers already: rank one with a mixer in every layer (`keep: []`)"
            problems.append(Problem("", f"stages.{name}.from", message))
        layers = num_layers(base_of(recipe, stage.from_))
        if layers is not None and stage.keep >= layers:
            message = f"{stage.keep} of {layers} layers leaves nothing to replace: keep at most {layers - 1}"
            problems.append(Problem("", f"stages.{name}.keep", message))
    return problems


def num_layers(base: str | dict[str, Any] | None) -> int | None:
    """Decoder layers of a model from scratch, of a built-in one or of a folder with an absolute path; None where it cannot be told."""
    if isinstance(base, str):
        folder = BUILTIN / base.removeprefix("builtin:") if base.startswith("builtin:") else Path(base)
        if not folder.is_absolute():
            return None
        try:
            base = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # Reading the model says what is wrong with it.
            return None
    count = base.get("num_hidden_layers") if isinstance(base, dict) else None
    return count if isinstance(count, int) else None
