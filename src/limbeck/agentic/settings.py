"""Settings that are given by keyword, as the options that a recipe would make of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from limbeck.config.base import Options
from limbeck.config.messages import findings
from limbeck.errors import RecipeError

Kind = TypeVar("Kind", bound=Options)


def validated(cls: type[Kind], values: Mapping[str, Any], label: str) -> Kind:
    """Options of a class.  Raises :class:`RecipeError` with every value that a recipe would refuse."""
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        found = findings(cls, dict(values), error.errors())
        raise RecipeError([f"{'.'.join([label, *map(str, one.path)])}: {one.message}" for one in found]) from error
