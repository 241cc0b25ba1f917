"""Options of the surgeries: what is done to a base model to make a student of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from limbeck.config.base import Part, PartOf
from limbeck.config.parts.mixers import MIXERS
from limbeck.registry import Registry

SURGERIES = Registry("surgery")


@SURGERIES.register("limbeck.students.hybridize:Hybridize")
class HybridizeOptions(Part):
    """Replace softmax attention by a mixer in every layer that is not kept."""

    kind: Literal["hybridize"] = "hybridize"
    mixer: Annotated[Any, PartOf(MIXERS)] = Field({"kind": "gated_deltanet"})
    """What replaces attention."""
    keep: tuple[int, ...] | Literal["all"] = ()
    """Layers (from 0) that stay softmax; negative numbers count from the end."""
    calibration_rows: int = Field(16, ge=0)
    """Rows of the training text on which fresh mixers are fitted to the attention before the first step of a stage with
    `teacher: self`: forget rates to how far each head looks back, and the scale of each head.  0 leaves the neutral start."""
    gqa: Literal["heads", "rows"] = "heads"
    """How grouped key/value weights are expanded to one head a query head.  `rows` repeats weight rows as the reference
    repository did, which scrambles every head: it exists as a control for experiments."""
