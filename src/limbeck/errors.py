"""Errors meant for people.

Every bad input ends in one of these: the message names the field or file, what was found, what is allowed and the way
out.  The command line prints the message without a traceback and exits with code 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches


class LimbeckError(Exception):
    """Something the user can mend.  Anything else that escapes the command line is a bug of ours."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: where (``file:line:col`` or the override's words), which field, and what."""

    where: str
    path: str
    message: str

    def __str__(self) -> str:
        place = f"{self.where} " if self.where else ""
        field = f"{self.path}: " if self.path else ""
        return f"{place}{field}{self.message}"


class RecipeError(LimbeckError, ValueError):
    """A recipe that cannot be run.  Carries *all* problems found, not the first."""

    def __init__(self, problems: Iterable[Problem | str]):
        self.problems = [p if isinstance(p, Problem) else Problem("", "", p) for p in problems]
        super().__init__("\n".join(str(p) for p in self.problems))


class ModelError(LimbeckError, ValueError):
    """A model folder or a module graph that Limbeck cannot use, or will not guess about."""


class DataError(LimbeckError, ValueError):
    """Text, tokenizers or shards that are missing, damaged, or do not fit each other."""


class AdapterError(LimbeckError, ValueError):
    """LoRA files or targets that do not fit a model, or each other."""


class CheckpointError(LimbeckError, RuntimeError):
    """A checkpoint or artefact that is missing, damaged or belongs to something else."""


class TeacherError(LimbeckError, RuntimeError):
    """A teacher that cannot be reached, answers wrongly, or is not the one that was asked before."""


class RunError(LimbeckError, RuntimeError):
    """A run that cannot start or go on: locked folder, no disk, a failed gate, a non-finite number."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the nearest known words, or an empty string."""
    near = get_close_matches(word, list(known), n=2, cutoff=0.6)
    return f", did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
